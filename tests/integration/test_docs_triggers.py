"""Every example of docs/triggers.md is defined, triggered as it says, and gives what it says."""

import json
import re
from pathlib import Path

import pytest

from tests.integration.test_events import carried_out, define, sent, started
from tests.integration.test_hooks import by_github, deliver, secret_of
from tests.integration.test_timekeeper import CONFIG, MINUTE_MS, calls, keeper, set_clock
from tests.support.api import Api

PAGE = (Path(__file__).parents[2] / "docs" / "triggers.md").read_text()
EXAMPLES = re.findall(
    r"```yaml\n# sent: (.*?)\n(?:# then: (.*?)\n)?# gives: (.*?)\n(.*?)```", PAGE, re.DOTALL
)

CLOCKS = re.findall(r"```yaml\n# after: 10m\n# gives: (.*?)\n(.*?)```", PAGE, re.DOTALL)
HOOKS = re.findall(r"```yaml\n# hook: (.*?)\n# gives: (.*?)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("event", "then", "gives", "text"), EXAMPLES)
async def test_an_example_gives_what_the_page_says(
    api: Api, event: str, then: str, gives: str, text: str
) -> None:
    await define(api, "example", text)
    await sent(api, json.loads(event))
    if then:
        await carried_out(api)
        await sent(api, json.loads(then))
    (record,) = await started(api, "example")
    assert (record["error"] or record["data"]) == json.loads(gives)


@pytest.mark.parametrize(("gives", "text"), CLOCKS)
async def test_a_clock_of_the_page_runs(api: Api, gives: str, text: str) -> None:
    await calls(api)("SET", f"{CONFIG}:cron:owner", "k1", "PX", 600_000)
    await define(api, "example", text)
    await set_clock(api, "example", 10 * MINUTE_MS)
    await keeper(api, "k1").beat()
    (record,) = await started(api, "example")
    assert (record["error"] or record["data"]) == json.loads(gives)


@pytest.mark.parametrize(("body", "gives", "text"), HOOKS)
async def test_a_hook_of_the_page_runs(api: Api, body: str, gives: str, text: str) -> None:
    await define(api, "example", text)
    secret = await secret_of(api, "example")
    answer = await deliver(api, "example", body.encode(), by_github(secret, body.encode()))
    assert answer.status_code == 202
    (record,) = await started(api, "example")
    assert (record["error"] or record["data"]) == json.loads(gives)


def test_every_example_is_run() -> None:
    assert PAGE.count("```yaml\n") == len(EXAMPLES) + len(CLOCKS) + len(HOOKS)

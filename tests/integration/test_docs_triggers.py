"""Every example of docs/triggers.md is defined, triggered as it says, and gives what it says."""

import json
import re
from pathlib import Path

import pytest

from tests.integration.test_events import carried_out, define, sent, started
from tests.support.api import Api

PAGE = (Path(__file__).parents[2] / "docs" / "triggers.md").read_text()
EXAMPLES = re.findall(
    r"```yaml\n# sent: (.*?)\n(?:# then: (.*?)\n)?# gives: (.*?)\n(.*?)```", PAGE, re.DOTALL
)


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


def test_every_example_is_run() -> None:
    assert PAGE.count("```yaml\n") == len(EXAMPLES)

"""Every example of docs/workflows.md runs and gives what stands beside it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from serve_app.core.execution import Status
from serve_app.core.workflow import COMPOSITES, every_step
from tests.support.definitions import EXPRESSIONS, PLAIN, parsed
from tests.support.rig import Rig
from tests.support.virtual_time import virtual_time

PAGE = (Path(__file__).parents[2] / "docs" / "workflows.md").read_text()
EXAMPLES = re.findall(
    r"```yaml\n# input: (.*?)\n(?:# signal: (.*?)\n)?# gives: (.*?)\n(.*?)```", PAGE, re.DOTALL
)


@pytest.mark.parametrize(("value", "signal", "gives", "text"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_gives_what_the_page_says(
    value: str, signal: str, gives: str, text: str
) -> None:
    @virtual_time
    async def run() -> None:
        rig = Rig(parsed(yaml.dump(yaml.safe_load(text)["steps"])), expressions=EXPRESSIONS)
        if signal:
            await rig.driver(input=json.loads(value))
            rig.signal(**json.loads(signal))
        ended = await rig.drive_to_the_end(input=json.loads(value))
        assert (ended.status, ended.error) == (Status.COMPLETED, None)
        assert ended.data == json.loads(gives)

    run()


def test_every_example_is_run_and_every_step_type_has_one() -> None:
    assert PAGE.count("```yaml\n") == len(EXAMPLES)
    workflows = [parsed(yaml.dump(yaml.safe_load(text)["steps"])) for *_, text in EXAMPLES]
    shown = {step.type for workflow in workflows for step in every_step(workflow.steps)}
    assert shown >= {*PLAIN, *COMPOSITES}

"""Every example of docs/workflows.md runs and gives what stands beside it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from serve_app.core.execution import Status
from serve_app.core.workflow import COMPOSITES, every_step
from tests.support.rig import Rig
from tests.support.virtual_time import virtual_time
from tests.unit.test_composites import EXPRESSIONS, parsed

PAGE = (Path(__file__).parents[2] / "docs" / "workflows.md").read_text()
EXAMPLES = re.findall(r"```yaml\n# input: (.*?)\n# gives: (.*?)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("value", "gives", "text"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_gives_what_the_page_says(value: str, gives: str, text: str) -> None:
    @virtual_time
    async def run() -> None:
        workflow = parsed(yaml.dump(yaml.safe_load(text)["steps"]))
        ended = await Rig(workflow, expressions=EXPRESSIONS).drive(input=json.loads(value))
        assert (ended.status, ended.error) == (Status.COMPLETED, None)
        assert ended.data == json.loads(gives)

    run()


def test_every_example_is_run_and_every_step_type_has_one() -> None:
    assert PAGE.count("```yaml") == len(EXAMPLES)
    workflows = [parsed(yaml.dump(yaml.safe_load(text)["steps"])) for _, _, text in EXAMPLES]
    shown = {step.type for workflow in workflows for step in every_step(workflow.steps)}
    assert shown >= {"echo", "transform", *COMPOSITES}

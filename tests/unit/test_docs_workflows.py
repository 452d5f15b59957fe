"""Every example of docs/workflows.md runs and gives what stands beside it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from serve_app.core.execution import Status
from serve_app.core.workflow import COMPOSITES, every_step
from tests.support.definitions import EXPRESSIONS, PLAIN, Model, parsed
from tests.support.rig import Rig
from tests.support.virtual_time import virtual_time

PAGE = (Path(__file__).parents[2] / "docs" / "workflows.md").read_text()
EXAMPLES = re.findall(
    r"```yaml\n# input: (.*?)\n(?:# signal: (.*?)\n)?(?:# model: (.*?)\n)?# gives: (.*?)\n(.*?)```",
    PAGE,
    re.DOTALL,
)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_gives_what_the_page_says(example: tuple[str, ...]) -> None:
    value, signal, replies, gives, text = example

    @virtual_time
    async def run() -> None:
        model = Model(*json.loads(replies or "[]"))
        workflow = parsed(yaml.dump(yaml.safe_load(text)["steps"]))
        rig = Rig(workflow, expressions=EXPRESSIONS, further_types={"generate": model.step_type})
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

"""Workflows from YAML with the real expressions and step types, driven in virtual time."""

import yaml

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.core.definition import parse_workflow
from serve_app.core.execution import Execution
from serve_app.core.inference import JsonValue
from serve_app.core.workflow import Workflow
from serve_app.steps.approval import APPROVAL
from serve_app.steps.echo import ECHO
from serve_app.steps.emit import EMIT
from serve_app.steps.http import http_step
from serve_app.steps.publish import PUBLISH
from serve_app.steps.sleep import SLEEP
from serve_app.steps.transform import TRANSFORM
from serve_app.steps.wait_for_event import WAIT_FOR_EVENT
from tests.support.checker import entries_of_stored, journal_problems
from tests.support.rig import Rig, Run, Scripted
from tests.support.workflows import EXECUTION_ID

PLAIN = {
    "echo": ECHO,
    "transform": TRANSFORM,
    "http": http_step(Scripted(), 1000),
    "publish": PUBLISH,
    "emit": EMIT,
    "sleep": SLEEP,
    "approval": APPROVAL,
    "wait_for_event": WAIT_FOR_EVENT,
}
EXPRESSIONS, SCHEMAS = CelExpressions(), JsonSchemas()


def parsed(steps: str, **members: object) -> Workflow:
    document = {"id": "wf", "steps": yaml.safe_load(steps), **members}
    checks = {name: kind.check for name, kind in PLAIN.items()} | {"work": lambda _: ()}
    return parse_workflow(
        document, check_expression=EXPRESSIONS.check, check_schema=SCHEMAS.check, step_checks=checks
    )


def a_rig(steps: str, work: Run | None = None, **runs: Run) -> Rig:
    workflow = parsed(steps)
    names = {step_id for step_id in workflow._by_id if workflow._by_id[step_id].type == "work"}
    default = dict.fromkeys(names, work) if work is not None else {}
    return Rig(workflow, {**default, **runs}, expressions=EXPRESSIONS)


async def driven(rig: Rig, value: JsonValue = None, **created: object) -> Execution:
    ended = await rig.drive(input=value, **created)
    assert journal_problems(entries_of_stored(rig.store.journals[EXECUTION_ID])) == []
    return ended

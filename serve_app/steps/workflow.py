"""`workflow`: run another workflow as a child; its output is the child's data.

The child's failure is the step's. The child has the parent's deadline at most, and ends with it.
"""

from collections.abc import Awaitable, Callable, Sequence

from serve_app.core.errors import Problem
from serve_app.core.inference import JsonValue
from serve_app.core.step_forms import form_problems, member, text, text_problems
from serve_app.ports import StepCall, StepType
from serve_app.services.children import Children


def workflow_step(children: Children) -> StepType:
    """The step type, bound to what starts children."""
    return StepType(check=_check, run=_runner(children))


def _runner(children: Children) -> Callable[[StepCall], Awaitable[JsonValue]]:
    async def run(call: StepCall) -> JsonValue:
        workflow_id = text(call.settings, "id")
        await children.start(call, workflow_id, member(call.settings, "input"))
        return None

    return run


def _check(settings: JsonValue) -> Sequence[Problem]:
    problems = form_problems("workflow", settings, ("id", "input"))
    return problems or text_problems(settings, "id")

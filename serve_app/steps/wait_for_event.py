"""`wait_for_event`: wait for an event of a name; its output is the event, or null past `timeout`.

The event is `{name, data}`. `if` is CEL over what a step sees and `event`; an event it is false for
is left for others. A signal of the step's own name answers it whatever `if` says.
"""

from collections.abc import Sequence

from serve_app.core.errors import Problem
from serve_app.core.execution import Wait, WaitKind
from serve_app.core.inference import JsonValue
from serve_app.core.step_forms import (
    duration_ms,
    duration_problems,
    form_problems,
    member,
    text,
    text_problems,
)
from serve_app.ports import StepCall, StepType


def _check(settings: JsonValue) -> Sequence[Problem]:
    problems = form_problems("wait_for_event", settings, ("event", "timeout"), ("if",))
    if not problems:
        problems += text_problems(settings, "event")
        problems += duration_problems(member(settings, "timeout"), "timeout")
    return problems


def _wait(call: StepCall, now_ms: int) -> Wait:
    until_ms = now_ms + duration_ms(member(call.settings, "timeout"), "timeout")
    return Wait(WaitKind.EVENT, until_ms, event=text(call.settings, "event"))


WAIT_FOR_EVENT = StepType(check=_check, wait=_wait)

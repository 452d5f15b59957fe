"""`approval`: wait until a signal of the step's name says yes or no.

Its output is `{approved, data}`. Only `true` or `{"approved": true}` approves; whatever else does
not, and neither does silence until `timeout`, when `data` is null.
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
    problems = form_problems("approval", settings, ("message", "timeout"))
    if not problems:
        problems += text_problems(settings, "message")
        problems += duration_problems(member(settings, "timeout"), "timeout")
    return problems


def _wait(call: StepCall, now_ms: int) -> Wait:
    until_ms = now_ms + duration_ms(member(call.settings, "timeout"), "timeout")
    return Wait(WaitKind.APPROVAL, until_ms, message=text(call.settings, "message"))


APPROVAL = StepType(check=_check, wait=_wait)

"""`sleep`: a duration, or `{until}` a moment; its output is null."""

from collections.abc import Mapping, Sequence

from serve_app.core.errors import Problem, StepFailedError
from serve_app.core.execution import Wait, WaitKind
from serve_app.core.inference import JsonValue
from serve_app.core.step_forms import (
    duration_ms,
    duration_problems,
    form_problems,
    member,
    moment_ms,
)
from serve_app.core.template import expressions_in
from serve_app.core.workflow import DURATION_MS_MAX
from serve_app.ports import StepCall, StepType


def _check(settings: JsonValue) -> Sequence[Problem]:
    if not isinstance(settings, Mapping):
        return duration_problems(settings)
    problems = form_problems("sleep", settings, ("until",))
    if not problems and not expressions_in(settings["until"]):
        try:
            moment_ms(settings["until"], "until")
        except StepFailedError as error:
            problems.append(Problem(("until",), str(error)))
    return problems


def _wait(call: StepCall, now_ms: int) -> Wait:
    if not isinstance(call.settings, Mapping):
        return Wait(WaitKind.TIME, now_ms + duration_ms(call.settings, "sleep"))
    until_ms = moment_ms(member(call.settings, "until"), "until")
    if until_ms - now_ms > DURATION_MS_MAX:
        raise StepFailedError("until: more than 366 days from now", False)  # noqa: FBT003
    return Wait(WaitKind.TIME, until_ms)


SLEEP = StepType(check=_check, wait=_wait)

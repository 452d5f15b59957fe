"""`publish`: tell whoever follows how far the execution is; its output is null."""

from collections.abc import Sequence

from serve_app.core.errors import Problem, StepFailedError
from serve_app.core.inference import JsonValue
from serve_app.core.step_forms import form_problems, member
from serve_app.core.template import expressions_in
from serve_app.ports import StepCall, StepType

PERCENT_MAX = 100
MESSAGE_CHARS_MAX = 2_000


def _percent(value: JsonValue) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= PERCENT_MAX else None


def _check(settings: JsonValue) -> Sequence[Problem]:
    problems = form_problems("publish", settings, ("progress",), ("message",))
    if not problems:
        progress, message = member(settings, "progress"), member(settings, "message")
        if not expressions_in(progress) and _percent(progress) is None:
            problems.append(Problem(("progress",), f"is a number from 0 to {PERCENT_MAX}"))
        if message is not None and not isinstance(message, str):
            problems.append(Problem(("message",), "is text"))
    return problems


def _compute(call: StepCall) -> JsonValue:
    progress = _percent(member(call.settings, "progress"))
    message = member(call.settings, "message")
    if progress is None:
        raise StepFailedError(f"progress: is a number from 0 to {PERCENT_MAX}", False)  # noqa: FBT003
    text = "" if message is None else str(message)
    call.publish(progress, text[:MESSAGE_CHARS_MAX])
    return None


PUBLISH = StepType(check=_check, compute=_compute)

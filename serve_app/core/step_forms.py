"""The forms that settings of steps share: known keys, durations and moments.

Owns what a step type can say of its settings before any input is known, and how it reads them once
every expression has its value. Invariant: what holds an expression is judged only when it runs.
"""

from collections.abc import Collection, Mapping
from datetime import datetime

from serve_app.core.errors import Problem, StepFailedError
from serve_app.core.inference import JsonValue
from serve_app.core.template import expressions_in
from serve_app.core.workflow import parse_duration_ms


def form_problems(
    kind: str, settings: JsonValue, required: Collection[str], optional: Collection[str] = ()
) -> list[Problem]:
    """What is wrong with the keys of settings that must be an object."""
    known = [*required, *optional]
    if not isinstance(settings, Mapping):
        return [Problem((), f"{kind} takes an object of {', '.join(known)}")]
    unknown = [
        Problem((key,), f"unknown setting; known: {', '.join(known)}")
        for key in settings
        if key not in known
    ]
    return unknown + [Problem((key,), "is required") for key in required if key not in settings]


def duration_problems(value: JsonValue, *loc: str) -> list[Problem]:
    """What is wrong with a duration; nothing where it holds an expression."""
    if expressions_in(value):
        return []
    try:
        parse_duration_ms(value)
    except ValueError as error:
        return [Problem(loc, str(error))]
    return []


def text_problems(settings: JsonValue, *keys: str) -> list[Problem]:
    """Which of these members, where they are there, are no text."""
    found = settings if isinstance(settings, Mapping) else {}
    return [
        Problem((key,), "is text")
        for key in keys
        if key in found and not (isinstance(found[key], str) and found[key])
    ]


def duration_ms(value: JsonValue, name: str) -> int:
    """A duration whose expressions have their values.

    Raises:
        StepFailedError: not retryable: it is none.
    """
    try:
        return parse_duration_ms(value)
    except ValueError as error:
        raise StepFailedError(f"{name}: {error}", False) from error  # noqa: FBT003


def moment_ms(value: JsonValue, name: str) -> int:
    """A moment, RFC 3339 with its offset or Unix ms.

    Raises:
        StepFailedError: not retryable: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        form = "a moment such as 2026-01-31T08:00:00Z, or Unix milliseconds"
        raise StepFailedError(f"{name}: {str(value)[:100]!r} is no {form[2:]}", False)  # noqa: FBT003
    return round(moment.timestamp() * 1000)


def member(settings: JsonValue, name: str) -> JsonValue:
    """A member of settings that are an object; null where there is none."""
    return settings.get(name) if isinstance(settings, Mapping) else None


def text(settings: JsonValue, name: str) -> str:
    """A member that is text.

    Raises:
        StepFailedError: not retryable: it is not.
    """
    found = member(settings, name)
    if isinstance(found, str) and found:
        return found
    raise StepFailedError(f"{name}: is text", False)  # noqa: FBT003

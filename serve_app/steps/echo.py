"""`echo`: an object of values; the empty object stands for the execution's input."""

from collections.abc import Mapping, Sequence

from serve_app.core.errors import Problem
from serve_app.core.inference import JsonValue
from serve_app.ports import StepCall, StepType


def _check(settings: JsonValue) -> Sequence[Problem]:
    if isinstance(settings, Mapping):
        return ()
    return (Problem((), "echo takes an object of values; {} stands for the input"),)


def _compute(call: StepCall) -> JsonValue:
    return call.settings or call.input


ECHO = StepType(check=_check, compute=_compute)

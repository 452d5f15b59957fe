"""`transform`: one expression, or an object or list of them; its output is their value."""

from collections.abc import Sequence

from serve_app.core.errors import Problem
from serve_app.core.inference import JsonValue
from serve_app.core.template import expressions_in
from serve_app.ports import StepCall, StepType


def _check(settings: JsonValue) -> Sequence[Problem]:
    if expressions_in(settings):
        return ()
    return (Problem((), "transform needs an expression, such as {{ input.name }}"),)


def _compute(call: StepCall) -> JsonValue:
    return call.settings


TRANSFORM = StepType(check=_check, compute=_compute)

"""The bound on what a step may give: beyond it the step fails, in words, and is not tried again.

Owns the check alone; it stands around every step type, so that none can forget it.
"""

from collections.abc import Mapping
from dataclasses import replace

import orjson

from serve_app.core.errors import StepFailedError
from serve_app.core.inference import JsonValue
from serve_app.ports import StepCall, StepType


def bounded(step_types: Mapping[str, StepType], result_max_bytes: int) -> Mapping[str, StepType]:
    """The same step types, with results of at most so many bytes of JSON."""
    return {name: _bounded(kind, result_max_bytes) for name, kind in step_types.items()}


def _bounded(kind: StepType, limit: int) -> StepType:
    compute, run = kind.compute, kind.run

    def checked(call: StepCall, output: JsonValue) -> JsonValue:
        size = len(orjson.dumps(output))
        if size > limit:
            raise StepFailedError(
                f"the result of step {call.step_id} takes {size} bytes; "
                f"INFERPIPE_RESULT_MAX_BYTES allows {limit}",
                False,  # noqa: FBT003 - positional, so that it pickles
            )
        return output

    if compute is not None:
        return replace(kind, compute=lambda call: checked(call, compute(call)))
    if run is None:
        return kind

    async def bounded_run(call: StepCall) -> JsonValue:
        return checked(call, await run(call))

    return replace(kind, run=bounded_run)

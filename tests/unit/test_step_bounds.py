"""A step's result at the limit, below it and above it."""

import pytest

from serve_app.core.errors import StepFailedError
from serve_app.core.inference import JsonValue
from serve_app.ports import StepCall, StepType
from serve_app.steps.bounds import bounded

LIMIT = 12  # bytes of JSON, the two quotes included


def a_call(text: str) -> StepCall:
    return StepCall(
        execution_id="exe_00a",
        step_id="big",
        attempt=1,
        settings=text,
        input=None,
        idempotency_key="k",
        deadline_ms=None,
        priority=0,
        emit=lambda *_: None,
        report_usage=lambda _: None,
    )


def computed(call: StepCall) -> JsonValue:
    return call.settings


async def ran(call: StepCall) -> JsonValue:
    return call.settings


TYPES = bounded(
    {
        "pure": StepType(check=lambda _: (), compute=computed),
        "with effects": StepType(check=lambda _: (), run=ran),
    },
    LIMIT,
)


async def result(kind: StepType, call: StepCall) -> JsonValue:
    if kind.compute is not None:
        return kind.compute(call)
    assert kind.run is not None
    return await kind.run(call)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("length", [LIMIT - 3, LIMIT - 2])
async def test_a_result_up_to_the_limit_passes(name: str, length: int) -> None:
    assert await result(TYPES[name], a_call("x" * length)) == "x" * length


@pytest.mark.parametrize("name", TYPES)
async def test_a_larger_one_fails_and_names_the_setting(name: str) -> None:
    with pytest.raises(StepFailedError, match="13 bytes; INFERPIPE_RESULT_MAX_BYTES") as caught:
        await result(TYPES[name], a_call("x" * (LIMIT - 1)))
    assert not caught.value.retryable

"""What a composite or an execution gives, at the bound, below it and above it."""

import asyncio

import pytest

from serve_app.core.execution import Execution, MapOpened, Status
from serve_app.core.inference import JsonValue
from serve_app.core.plain_json import json_bytes
from serve_app.ports import StepCall
from tests.support.definitions import EXPRESSIONS, driven, parsed
from tests.support.rig import Rig
from tests.support.virtual_time import virtual_time

LIMIT = 100  # bytes of JSON

MAP = """
- id: each
  map:
    over: "{{ input }}"
    concurrency: CONCURRENCY
    onError: skip
    steps: [{id: big, work: "{{ item }}"}]
- {id: last, echo: {}}
"""
PARALLEL = """
- id: both
  parallel:
    branches:
      left: [{id: a, transform: "{{ input }}"}]
      right: [{id: b, transform: "{{ input }}"}]
"""


async def ten_bytes(call: StepCall) -> JsonValue:
    await asyncio.sleep(0.001)
    return "x" * 8


def a_rig(steps: str) -> Rig:
    return Rig(parsed(steps), {"big": ten_bytes}, expressions=EXPRESSIONS, result_bytes_max=LIMIT)


def a_map(concurrency: int = 1) -> Rig:
    return a_rig(MAP.replace("CONCURRENCY", str(concurrency)))


@virtual_time
async def test_a_map_at_its_bound_completes() -> None:
    ended = await driven(a_map(), list(range(10)))
    assert ended.status is Status.COMPLETED
    assert ended.steps["each"].output == ["x" * 8] * 10


@virtual_time
async def test_a_map_above_it_fails_and_names_the_setting() -> None:
    ended = await driven(a_map(), list(range(11)))
    assert (ended.status, ended.steps["each"].output) == (Status.FAILED, None)
    assert ended.error == (
        "step each: the results of 11 blocks take 110 bytes together; "
        "INFERPIPE_RESULT_MAX_BYTES allows 100"
    )
    assert "last" not in ended.steps


@pytest.mark.parametrize("concurrency", [1, 3, 10, 100])
def test_a_long_list_is_not_gone_through_to_its_end(concurrency: int) -> None:
    @virtual_time
    async def run() -> None:
        rig = a_map(concurrency)
        ended = await driven(rig, list(range(5000)))
        assert ended.status is Status.FAILED
        assert "INFERPIPE_RESULT_MAX_BYTES allows 100" in str(ended.error)
        assert len(rig.calls) <= 2 * 16 + concurrency
        assert sum(isinstance(event, MapOpened) for event in rig.events) == 1

    run()


@pytest.mark.parametrize(("size", "status"), [(48, Status.COMPLETED), (49, Status.FAILED)])
def test_branches_count_together(size: int, status: Status) -> None:
    @virtual_time
    async def run() -> None:
        ended: Execution = await driven(a_rig(PARALLEL), "x" * size)
        assert ended.status is status
        if status is Status.FAILED:
            assert "the results of 2 blocks take 102 bytes together" in str(ended.error)

    run()


@pytest.mark.parametrize(("size", "status"), [(98, Status.COMPLETED), (99, Status.FAILED)])
def test_an_executions_output_is_bounded(size: int, status: Status) -> None:
    @virtual_time
    async def run() -> None:
        rig = Rig(
            parsed("- {id: a, echo: {}}", output="{{ input }}"),
            expressions=EXPRESSIONS,
            result_bytes_max=LIMIT,
        )
        ended = await driven(rig, "x" * size)
        assert ended.status is status
        if status is Status.FAILED:
            assert (
                ended.error == "output: it takes 101 bytes; INFERPIPE_RESULT_MAX_BYTES allows 100"
            )

    run()


def test_size_is_that_of_compact_json() -> None:
    assert json_bytes({"a": [1, "é"]}) == len('{"a":[1,"é"]}'.encode())

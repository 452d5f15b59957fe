"""Large inputs and results: kept apart, fetched when needed, never dragged along."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.adapters.redis_store import StoreLimits
from serve_app.core.errors import BodyTooLargeError
from serve_app.core.execution import ExecutionCreated, Status, StepCompleted
from serve_app.core.inference import JsonValue
from serve_app.core.journal import Appended, Assigned, execution_id
from serve_app.ports import ListQuery, StepCall, StepType
from serve_app.services.executions import Submission
from tests.integration.conftest import StoreBench
from tests.support.harness import Harness
from tests.support.valkey_cluster import flush

LARGE = "x" * 5_000_000
LIMITS = StoreLimits(inline_bytes=1000, input_bytes=6_000_000, page_bytes=1 << 20)
DOUBLE = {
    "id": "double",
    "steps": [{"id": "one", "work": {}}, {"id": "two", "work": {}}],
    "output": {"first": "{{ steps.one.output }}", "size": "{{ size(input.text) }}"},
}


async def work(call: StepCall) -> JsonValue:
    assert isinstance(call.input, dict)
    call.emit("a word", ())
    return {"echo": call.input["text"], "step": call.step_id}


@pytest.fixture
async def harness(store_url: str) -> AsyncIterator[Harness]:
    running = Harness(
        store_url,
        step_types={"work": StepType(check=lambda _: (), run=work)},
        definitions=[DOUBLE],
        store_limits=LIMITS,
    )
    await flush(store_url)
    yield running
    await running.close()


async def test_five_megabytes_go_through_and_come_back(harness: Harness) -> None:
    await harness.start_executor("w1")
    async with harness.surface() as (executions, feeds):
        wish = Submission(execution_id(0, "big"), "default", "double", {"text": LARGE})
        async with executions.start_and_follow(wish) as (_, feed), asyncio.timeout(30):
            ended = await feed.ended()
        assert ended.status is Status.COMPLETED
        expected = {"first": {"echo": LARGE, "step": "one"}, "size": len(LARGE)}
        assert ended.data == expected
        # A reader that comes later sees the same, from the journal.
        loaded = await executions.load("default", wish.execution_id)
        assert loaded == ended
        assert loaded.steps["two"].output == {"echo": LARGE, "step": "two"}
        frames: list[bytes] = []
        async with executions.follow("default", wish.execution_id) as again:
            cursor = 0
            while batch := await feeds.next_frames(again, cursor):
                frames += [frame for _, frame in batch if frame is not None]
                cursor = batch[-1][0]
        assert len([frame for frame in frames if LARGE.encode() in frame]) == 3


async def test_what_workers_and_lists_read_stays_small(harness: Harness, store_url: str) -> None:
    _, store = harness.connect()
    new_id = execution_id(1, "big")
    created = ExecutionCreated(5, "default", "double", 1, {"text": LARGE}, metadata={"k": "v"})
    await store.create(new_id, created, "create", "")
    commands = await commands_moving_much(store_url, harness, new_id)
    assert commands == {"hmget": 1}  # the worker's own look at the input, and nothing else
    [item] = await store.recent(ListQuery("default"))
    assert (item.id, item.created.input, item.created.metadata) == (new_id, None, {"k": "v"})


async def commands_moving_much(url: str, harness: Harness, new_id: str) -> dict[str, int]:
    """How often each command of a worker's round answered with more than 100 kB."""
    _, store = harness.connect()
    counts: dict[str, int] = {}
    inner = store._calls._until_answered

    async def counting(key: str, command: Any) -> Any:
        answer = await inner(key, command)
        if len(repr(answer)) > 100_000:
            name = str(command[0] if command[0] != "FCALL" else command[1]).lower()
            counts[name] = counts.get(name, 0) + 1
        return answer

    store._calls._until_answered = counting  # type: ignore[method-assign]
    await store.heartbeat(1, "w1", 60_000, 10)
    [owned] = await store.claim(1, "w1", 10)
    assert owned.execution.created.input == {"text": LARGE}
    await store.heartbeat(1, "w1", 60_000, 10)
    await store.recent(ListQuery("default"))
    await store.last_seqs([new_id])
    return counts


async def test_bells_carry_no_payloads(bench: StoreBench, harness: Harness) -> None:
    _, store = harness.connect()
    await store.heartbeat(2, "w1", 60_000, 10)
    async with bench.bells("w1", "ingress").listen() as notices:
        new_id = execution_id(2, "big")
        created = ExecutionCreated(5, "default", "double", 1, {"text": LARGE})
        await store.create(new_id, created, "create", "ingress")
        assigned = await anext(notices)
        assert isinstance(assigned, Assigned)
        assert assigned.execution is None
        harness_run = asyncio.ensure_future(harness.start_executor("w1"))
        async with asyncio.timeout(20):
            while not (isinstance(notice := await anext(notices), Appended) and not notice.events):
                pass
        await harness_run
    read = [one for seq in range(9) for one in await store.read(new_id, seq, 1)]
    told = [one.event for one in read if notice.first_seq <= one.seq <= notice.last_seq]
    assert any(isinstance(event, StepCompleted) for event in told)


async def test_a_page_of_a_journal_is_bounded_by_what_it_brings(harness: Harness) -> None:
    await harness.start_executor("w1")
    async with harness.surface() as (executions, _):
        wish = Submission(execution_id(3, "big"), "default", "double", {"text": LARGE})
        async with executions.start_and_follow(wish) as (_, feed), asyncio.timeout(30):
            last = (await feed.ended()).seq
    _, store = harness.connect()
    seen, pages = 0, 0
    while page := await store.read(wish.execution_id, seen, 1000):
        assert page[0].seq == seen + 1
        seen, pages = page[-1].seq, pages + 1
    assert seen == last
    assert pages >= 3


async def test_an_input_above_the_limit_is_refused_by_its_setting(harness: Harness) -> None:
    _, store = harness.connect()
    created = ExecutionCreated(5, "default", "double", 1, "x" * 6_000_000)
    with pytest.raises(BodyTooLargeError, match="INFERPIPE_INPUT_MAX_BYTES allows 6000000"):
        await store.create(execution_id(0, "big"), created, "create", "")
    assert await store.load(execution_id(0, "big")) is None

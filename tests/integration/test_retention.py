"""What ended is forgotten in time, everywhere, and a workspace holds no more than it may."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from serve_app.adapters.redis_store import DEFAULT_LIMITS, RedisStore, StoreLimits
from serve_app.core.execution import (
    Execution,
    ExecutionCompleted,
    ExecutionCreated,
    ExecutionStarted,
    Status,
    evolve,
)
from serve_app.core.inference import JsonValue
from serve_app.core.journal import Commit, execution_id
from serve_app.ports import ListQuery, StepCall, StepType
from serve_app.services.executions import Executions, Submission
from tests.support.harness import PARTITIONS, Harness
from tests.support.valkey_cluster import flush, raw_client

WITHIN_S = 30.0
RETENTION_MS = 1500
SMALL = {"id": "small", "steps": [{"id": "one", "work": {}}]}
LIMITS = StoreLimits(inline_bytes=1000)


async def work(call: StepCall) -> JsonValue:
    call.emit("a word ", (1, 2))
    if call.input == "wait":
        await asyncio.Event().wait()
    return {"text": "x" * 3000}


@pytest.fixture
async def harness(store_url: str) -> AsyncIterator[Harness]:
    running = Harness(
        store_url,
        step_types={"work": StepType(check=lambda _: (), run=work)},
        definitions=[SMALL],
        store_limits=LIMITS,
        retention_ms=RETENTION_MS,
    )
    await flush(store_url)
    yield running
    await running.close()


async def run_all(executions: Executions, ids: list[str], given: JsonValue = None) -> None:
    async def one(new_id: str) -> Execution:
        wish = Submission(new_id, "default", "small", given)
        async with executions.start_and_follow(wish) as (_, feed):
            return await feed.ended()

    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(*map(one, ids))


def ids_of(word: str, count: int) -> list[str]:
    return [execution_id(number % PARTITIONS, f"{word}{number}") for number in range(count)]


READ_BY = {
    "string": ("GET",),
    "hash": ("HGETALL",),
    "set": ("SMEMBERS",),
    "zset": ("ZRANGE", 0, -1),
    "stream": ("XRANGE", "-", "+"),
    "list": ("LRANGE", 0, -1),
}


async def everything(url: str) -> dict[str, Any]:
    """The whole key space, contents included."""
    found: dict[str, Any] = {}
    async with raw_client(url) as client:
        async for key in client.scan_iter(count=1000):
            kind = (await client.type(key)).decode()
            if kind == "none":
                continue  # it went between the two questions
            command, *rest = READ_BY[kind]
            found[key.decode()] = await client.execute_command(command, key, *rest)
    return found


async def listed(store: RedisStore, **wanted: Any) -> list[str]:
    return [one.id for one in await store.recent(ListQuery("default", limit=100, **wanted))]


async def test_nothing_of_an_execution_remains_after_its_time(
    harness: Harness, store_url: str
) -> None:
    await harness.start_executor("w1")
    _, store = harness.connect()
    ids = ids_of("gone", 20)
    async with harness.surface() as (executions, _):
        await run_all(executions, ids[:15])
        for one in ids[15:]:
            await executions.start(Submission(one, "default", "small", "wait"))
            await executions.cancel("default", one, "enough")
        assert set(await listed(store)) <= set(ids)
    async with asyncio.timeout(WITHIN_S):
        while await listed(store):
            await asyncio.sleep(0.05)
        while [key for key in await everything(store_url) if key.endswith(":ends")]:
            await asyncio.sleep(0.05)
    left = await everything(store_url)
    assert not [key for key, value in left.items() if "gone" in key or "gone" in repr(value)]
    # Only what belongs to the workers and the day's usage is left, however many there were.
    assert {key.partition("}:")[2].split(":")[0] for key in left} <= {
        *("workers", "capacity", "tokens", "use", "spent", "sync")
    }


async def test_a_list_never_shows_what_has_expired(harness: Harness, store_url: str) -> None:
    """Nobody trims here: no worker lives, so only the server's own expiry is at work."""
    harness.retention_ms = 50
    _, store = harness.connect()
    new_id = execution_id(0, "brief")
    created = ExecutionCreated(1, "default", "small", 1, None)
    await store.create(new_id, created, "create", "")
    [owned] = await store.claim(0, "w1", 1)
    events = (ExecutionStarted(2), ExecutionCompleted(3, "done"))
    after = evolve(evolve(owned.execution, events[0]), events[1])
    await store.commit(Commit("w1/1.1", owned.token, owned.execution, after, events))
    async with asyncio.timeout(WITHIN_S):
        while await store.load(new_id):
            await asyncio.sleep(0.02)
    assert any(":ix:" in key for key in await everything(store_url))
    for wanted in ({}, {"status": "completed"}, {"workflow_id": "small"}):
        assert await listed(store, **wanted) == []
    await store.heartbeat(0, "w1", 1000, 1)
    assert not any(":ix:" in key for key in await everything(store_url))


async def test_a_workspace_keeps_its_newest(harness: Harness) -> None:
    harness.retention_ms = 600_000
    harness.store_limits = replace(DEFAULT_LIMITS, kept_max=3 * PARTITIONS)
    await harness.start_executor("w1")
    _, store = harness.connect()
    async with harness.surface() as (executions, _):
        waiting = execution_id(0, "waits")
        await executions.start(Submission(waiting, "default", "small", "wait"))
        for number in range(5):
            batch = [execution_id(p, f"kept{number}") for p in range(PARTITIONS)]
            await run_all(executions, batch)
        kept = await listed(store)
        # What has not ended counts and stays; of the others the oldest went.
        assert waiting in kept
        expected = {
            execution_id(p, f"kept{number}")
            for p in range(PARTITIONS)
            for number in range(2 + (p == 0), 5)
        }
        assert set(kept) - {waiting} == expected
        assert set(await listed(store, status=Status.COMPLETED)) == expected
        assert await store.load(execution_id(1, "kept0")) is None
        assert await store.read(execution_id(1, "kept0"), 0, 10) == ()

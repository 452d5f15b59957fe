"""Messages between partitions on a real Valkey: told, not polled, and nothing lost on the way."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from serve_app.adapters.redis_index import partition_key
from serve_app.core.execution import Execution, ExecutionCreated
from serve_app.core.journal import Outgoing, execution_id
from serve_app.services.executor import WorkerLimits
from tests.support.harness import PARTITIONS, Harness
from tests.support.valkey_cluster import flush, raw_client

SLOW_BEATS = WorkerLimits(lease_ttl_ms=120_000, heartbeat_ms=30_000)
ECHO = {"id": "e", "steps": [{"id": "only", "echo": {}}]}


async def tell_all(execution: Execution) -> Sequence[Outgoing]:
    """One message to each partition."""
    return [
        Outgoing(f"{execution.id}.{p}", p, "ends", execution.id.encode()) for p in range(PARTITIONS)
    ]


@pytest.fixture
async def harness(store_url: str) -> AsyncIterator[Harness]:
    running = Harness(store_url, definitions=[ECHO], limits=SLOW_BEATS, on_end=tell_all)
    _, running.store = running.connect()
    await flush(store_url)
    yield running
    await running.close()


async def start(harness: Harness, number: int) -> str:
    new_id = execution_id(number % PARTITIONS, f"token{number}")
    created = ExecutionCreated(harness.clock.now_ms(), "default", "e", 1, {"n": number})
    await harness.store.create(new_id, created, "create", "")
    return new_id


async def told(client: Any, partition: int) -> list[bytes]:
    rows = await client.xrange(f"{partition_key(partition)}:log:ends")
    return [members[b"b"] for _, members in rows]


async def all_told(client: Any, count: int) -> None:
    async with asyncio.timeout(10):
        while any([len(await told(client, p)) < count for p in range(PARTITIONS)]):
            await asyncio.sleep(0.005)


async def test_an_ending_is_relayed_at_once_not_by_a_later_heartbeat(harness: Harness) -> None:
    """Beats are 30 s apart, and the test waits for less."""
    await harness.start_executor("w1")
    ids = [await start(harness, number) for number in range(40)]
    client = raw_client(harness.url)
    await all_told(client, len(ids))
    for partition in range(PARTITIONS):
        assert sorted(await told(client, partition)) == sorted(one.encode() for one in ids)
        assert await client.xlen(f"{partition_key(partition)}:outbox") == 0
    await client.aclose()


async def test_what_a_dead_worker_left_in_an_outbox_is_relayed_by_the_next(
    harness: Harness,
) -> None:
    client = raw_client(harness.url)
    outbox = f"{partition_key(2)}:outbox"
    for number in range(300):
        await client.xadd(outbox, {"m": f"m{number}", "t": "1:ends", "b": str(number)})
    # One was applied already: its sender died between sending and dropping it.
    await harness.store.send(Outgoing("m0", 1, "ends", b"0"))
    await harness.start_executor("w1")
    async with asyncio.timeout(10):
        while await client.xlen(outbox):
            await asyncio.sleep(0.005)
    assert await told(client, 1) == [str(number).encode() for number in range(300)]
    await client.aclose()


async def test_two_workers_that_relay_the_same_outbox_deliver_once(harness: Harness) -> None:
    client = raw_client(harness.url)
    for number in range(100):
        await client.xadd(
            f"{partition_key(0)}:outbox", {"m": f"m{number}", "t": "3:ends", "b": "x"}
        )
    _, other = harness.connect()
    await asyncio.gather(harness.store.relay(0, 64), other.relay(0, 64), other.relay(0, 100))
    assert len(await told(client, 3)) == 100
    await client.aclose()


async def test_a_message_that_cannot_be_applied_holds_up_no_other(harness: Harness) -> None:
    client = raw_client(harness.url)
    await client.set(f"{partition_key(1)}:log:broken", "no stream")
    outbox = f"{partition_key(0)}:outbox"
    for number, log in enumerate(("broken", "ends", "ends")):
        await client.xadd(outbox, {"m": f"m{number}", "t": f"1:{log}", "b": str(number)})
    with pytest.raises(Exception, match="WRONGTYPE"):
        await harness.store.relay(0, 64)
    assert await told(client, 1) == [b"1", b"2"]
    assert await client.xlen(outbox) == 1
    await harness.start_executor("w1")  # and its worker lives on
    await start(harness, 0)
    await all_told(client, 1)
    await client.aclose()


async def test_a_message_that_never_can_be_applied_is_put_aside(harness: Harness) -> None:
    client = raw_client(harness.url)
    await client.set(f"{partition_key(1)}:log:broken", "no stream")
    outbox, dead = f"{partition_key(0)}:outbox", f"{partition_key(0)}:dead"
    await client.xadd(outbox, {"m": "old", "t": "1:broken", "b": "0"}, id="1-0")
    await client.xadd(outbox, {"m": "young", "t": "1:broken", "b": "1"})
    for _ in range(12):
        with pytest.raises(Exception, match="WRONGTYPE"):
            await harness.store.relay(0, 64)
    [(_, members)] = await client.xrange(dead)
    assert (members[b"m"], members[b"t"], members[b"b"]) == (b"old", b"1:broken", b"0")
    assert b"WRONGTYPE" in members[b"why"]
    [(_, left)] = await client.xrange(outbox)
    assert left[b"m"] == b"young", "it may yet be applied: an upgrade may be under way"
    assert await client.hlen(f"{outbox}:faults") == 1
    await client.delete(f"{partition_key(1)}:log:broken")
    await harness.store.relay(0, 64)
    assert await client.xlen(outbox) == 0
    await client.aclose()


async def test_a_broken_message_to_a_child_holds_up_that_child_alone(harness: Harness) -> None:
    client = raw_client(harness.url)
    child = await start(harness, 1)
    outbox = f"{partition_key(0)}:outbox"
    body = f'{{"child": "{child}", "at_ms": 1}}'
    for name, text in (("other", "no JSON"), ("other", body), (child, body)):
        log = "child.cancel" if text == body else "child.start"
        await client.xadd(outbox, {"m": f"{log}.{name}", "t": f"1:{log}", "b": text})
    with pytest.raises(ValueError, match="invalid literal"):
        await harness.store.relay(0, 64)
    left = [members[b"m"].decode() for _, members in await client.xrange(outbox)]
    assert left == ["child.start.other", "child.cancel.other"]
    execution = await harness.store.load(child)
    assert execution is not None
    assert execution.status == "cancelling"
    await client.aclose()


async def test_a_log_that_nobody_writes_any_more_expires(harness: Harness) -> None:
    await harness.store.send(Outgoing("m1", 1, "ends", b"x"))
    client = raw_client(harness.url)
    assert await client.ttl(f"{partition_key(1)}:log:ends") > 86_400
    await client.aclose()

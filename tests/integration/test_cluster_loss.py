"""A cluster that loses nodes, slots and functions under load: nothing acknowledged is lost."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serve_app.adapters import redis_calls
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions, slot_of
from serve_app.adapters.system import SystemClock
from serve_app.core.errors import StoreUnavailableError
from serve_app.core.execution import Status
from serve_app.core.inference import JsonValue
from serve_app.core.journal import execution_id
from serve_app.ports import StepCall, StepType
from serve_app.services.executions import Executions, Submission
from serve_app.services.executor import WorkerLimits
from serve_app.services.feeds import Feeds
from tests.support.checker import Entry, entries_of_stored, journal_problems, view_problems
from tests.support.harness import PARTITIONS, Harness
from tests.support.valkey_cluster import HOST, PASSWORD, ClusterNode, ValkeyCluster

pytestmark = pytest.mark.timeout(120)
WITHIN_S = 60.0
TALK = {"id": "talk", "steps": [{"id": "one", "work": {}}, {"id": "two", "work": {}}]}
LIMITS = WorkerLimits(lease_ttl_ms=3000, heartbeat_ms=250)  # short outages are no deaths
STARTED_BEFORE, STARTED_AFTER = 24, 24
SLOT = slot_of("ip:{0}")


async def talk(call: StepCall) -> JsonValue:
    """Some tokens over a second, so that a loss falls into the middle."""
    words = [f"{number} " for number in range(40)]
    for number, word in enumerate(words):
        call.emit(word, (number,))
        await asyncio.sleep(0.02)
    return "".join(words)


@dataclass
class Load:
    """Executions under way, each followed by a reader; what was acknowledged, and what was seen."""

    harness: Harness
    executions: Executions
    feeds: Feeds
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def run_one(self) -> tuple[str, list[Entry]]:
        """Start and follow one; its id and what its reader was shown."""
        number = next(self.numbers)
        new_id = execution_id(number % PARTITIONS, f"load{number}")
        wish = Submission(new_id, "default", "talk", {"n": number})
        started = await self.executions.start(wish)
        seen: list[Entry] = []
        async with self.executions.follow("default", started.execution.id) as feed:
            cursor = 0
            while batch := await self.feeds.next_frames(feed, cursor):
                seen += [Entry(seq, kind_of(frame)) for seq, frame in batch if frame is not None]
                cursor = batch[-1][0]
        return started.execution.id, seen

    async def through(self, misfortune: Callable[[], Awaitable[None]]) -> None:
        """Start some, let it happen, start more, and judge all of them."""
        async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as group:
            runs = [group.create_task(self.run_one()) for _ in range(STARTED_BEFORE)]
            await asyncio.sleep(0.4)
            await misfortune()
            for _ in range(STARTED_AFTER):
                runs.append(group.create_task(self.run_one()))
                await asyncio.sleep(0.02)
        _, store = self.harness.connect()
        for run in runs:
            done_id, seen = run.result()
            journal = entries_of_stored(await store.read(done_id, 0, 10_000))
            assert journal_problems(journal) == [], done_id
            assert view_problems(seen, journal) == [], done_id
            execution = await store.load(done_id)
            assert execution is not None
            assert execution.status is Status.COMPLETED


def kind_of(frame: bytes) -> str:
    return next(line[7:] for line in frame.decode().splitlines() if line.startswith("event: "))


@asynccontextmanager
async def load_on(cluster: ValkeyCluster, ack_replicas: int) -> AsyncIterator[Load]:
    harness = Harness(
        cluster.url,
        step_types={"work": StepType(check=lambda _: (), run=talk)},
        definitions=[TALK],
        limits=LIMITS,
        ack_replicas=ack_replicas,
    )
    try:
        await harness.start_executor("w1")
        await harness.start_executor("w2")
        async with harness.surface() as (executions, feeds):
            yield Load(harness, executions, feeds)
    finally:
        await harness.close()


@pytest.fixture
async def replicated(tmp_path: Path) -> AsyncIterator[ValkeyCluster]:
    """Three primaries, a replica each; no fsync of our own, as the replica is the copy."""
    cluster = ValkeyCluster(tmp_path, replicas_each=1, fsync="no")
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


@pytest.fixture
async def durable(tmp_path: Path) -> AsyncIterator[ValkeyCluster]:
    """Three primaries without replicas that write before they answer."""
    cluster = ValkeyCluster(tmp_path, fsync="always")
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


async def test_a_killed_primary_is_replaced_by_its_replica(replicated: ValkeyCluster) -> None:
    async def kill() -> None:
        victim = await replicated.owner(SLOT)
        await victim.kill()
        await until_owner(replicated, lambda owner: owner is not victim)
        await victim.start("no")  # as an orchestrator does; it comes back as the replica

    async with load_on(replicated, ack_replicas=1) as load:
        await load.through(kill)


async def test_a_killed_primary_comes_back_with_all_it_acknowledged(
    durable: ValkeyCluster,
) -> None:
    async def kill() -> None:
        victim = await durable.owner(SLOT)
        await victim.kill()
        await asyncio.sleep(0.5)
        await victim.start("always")

    async with load_on(durable, ack_replicas=0) as load:
        await load.through(kill)


async def move_at_once(giver: ClusterNode, taker: ClusterNode) -> None:
    """As Valkey 9 moves a slot."""
    await giver.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", SLOT, SLOT, "NODE", taker.node_id)


async def move_key_by_key(giver: ClusterNode, taker: ClusterNode) -> None:
    """As older servers do; here with a pause while keys lie on both sides."""
    await taker.ask("CLUSTER", "SETSLOT", SLOT, "IMPORTING", giver.node_id)
    await giver.ask("CLUSTER", "SETSLOT", SLOT, "MIGRATING", taker.node_id)
    while keys := await giver.ask("CLUSTER", "GETKEYSINSLOT", SLOT, 20):
        place = (HOST, taker.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS")
        await giver.ask("MIGRATE", *place, *keys)
        await asyncio.sleep(0.05)
    for node in (taker, giver):
        await node.ask("CLUSTER", "SETSLOT", SLOT, "NODE", taker.node_id)


@pytest.mark.parametrize("move_slot", [move_at_once, move_key_by_key])
async def test_slots_that_move_and_functions_that_vanish_disturb_nobody(
    durable: ValkeyCluster, move_slot: Callable[[ClusterNode, ClusterNode], Awaitable[None]]
) -> None:
    async def move() -> None:
        giver = await durable.owner(SLOT)
        taker = next(node for node in durable.nodes if node is not giver)
        await taker.ask("FUNCTION", "FLUSH")
        await move_slot(giver, taker)
        await until_owner(durable, lambda owner: owner is taker)

    async with load_on(durable, ack_replicas=0) as load:
        await load.through(move)


async def until_owner(cluster: ValkeyCluster, is_wanted: Callable[[ClusterNode], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not is_wanted(await cluster.owner(SLOT)):
            await asyncio.sleep(0.05)


async def test_a_write_that_no_replica_has_is_not_acknowledged(
    cluster_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_calls, "RETRY_FOR_S", 0.1)
    monkeypatch.setattr(redis_calls, "ACK_WAIT_MS", 50)
    nodes = RedisNodes(RedisOptions(tuple(cluster_url.split(",")), ack_replicas=1))
    calls = RedisCalls(nodes, SystemClock())
    with pytest.raises(StoreUnavailableError, match="0 of 1 replicas"):
        await calls.call("SET", "ip:{0}:test", "value")
    await calls.close()

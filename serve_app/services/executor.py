"""One worker: owns executions, drives them, keeps its leases, takes over from the dead.

Owns the heartbeat, the claims and the table of drivers. Knows no step and no Redis. Invariant:
everything that can be told is told (pushes, bells, the answer of a heartbeat); what was not heard
is found by the next heartbeat, so a lost message costs half a second and never an execution.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from serve_app.core.errors import ServeAppError, StoreUnavailableError
from serve_app.core.journal import (
    Appended,
    Assigned,
    DeliveriesDue,
    Heartbeat,
    Notice,
    OutboxRang,
    Owned,
    ReadyRang,
    Resubscribed,
    partition_of,
)
from serve_app.ports import Bells, WorkflowCatalog
from serve_app.services.planner import Runtime
from serve_app.services.runner import Driver

logger = logging.getLogger(__name__)

RELAY_BATCH = 64  # messages of up to half a MiB each, in memory at once
CLAIM_MAX = 64
SWEEP_S = 1.0  # a cancel whose bell was lost waits so long; it must end within 2 s
MISSED_MAX = 1000  # events read for one execution in one sweep


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How often a worker shows that it lives, and how much it takes.

    Args:
        lease_ttl_ms: without a heartbeat for so long its executions go to others.
        heartbeat_ms: well below the lease, so that one lost beat is no death.
        capacity: executions owned at once, over all partitions.
    """

    lease_ttl_ms: int = 3_000
    heartbeat_ms: int = 500
    capacity: int = 512


@dataclass(slots=True)
class _Holding:
    """An execution held under one token; `driver` is set once its definition is there."""

    token: str
    partition: int
    task: "asyncio.Task[None] | None" = None
    driver: Driver | None = None


class Executor:
    """Drives the executions of one worker id over all partitions."""

    def __init__(
        self,
        worker_id: str,
        runtime: Runtime,
        bells: Bells,
        catalog: WorkflowCatalog,
        limits: WorkerLimits,
    ) -> None:
        self.worker_id = worker_id
        self.peers: frozenset[str] = frozenset()
        self.beat_at_s = 0.0
        self._runtime = runtime
        self._bells = bells
        self._catalog = catalog
        self._limits = limits
        partition_count = runtime.store.partition_count
        self._partitions = range(partition_count)
        self._share = max(1, limits.capacity // partition_count)
        self._held: dict[str, _Holding] = {}
        self._held_counts: Counter[int] = Counter()
        self._next_beat_ms = dict.fromkeys(self._partitions, 0)
        self._mismatched: set[int] = set()
        self._is_claiming: set[int] = set()
        self._relaying: dict[int, bool] = {}  # under way -> asked for again meanwhile
        self._peers_changed = asyncio.Event()
        self._timer_set = asyncio.Event()

    @property
    def owned_count(self) -> int:
        """Executions under way here."""
        return len(self._held)

    async def run(self) -> None:
        """Serve until cancelled, then hand everything over."""
        try:
            async with self._bells.listen() as notices, asyncio.TaskGroup() as group:
                group.create_task(self._hear(notices, group))
                group.create_task(self._beat(group))
                group.create_task(self._sweep())
        finally:
            await asyncio.shield(self._hand_over())

    async def take_over(self, worker_id: str) -> int:
        """Take what another worker owns; called on a hint that it is dead, safe when it is not."""
        taken = await asyncio.gather(
            *(self._runtime.store.reap(partition, worker_id) for partition in self._partitions)
        )
        logger.info("took over %d executions of %s", sum(taken), worker_id)
        return sum(taken)

    async def peers_changed(self) -> frozenset[str]:
        """Wait until the set of other live workers changes, and return it."""
        await self._peers_changed.wait()
        self._peers_changed.clear()
        return self.peers

    async def _hear(self, notices: AsyncIterator[Notice], group: asyncio.TaskGroup) -> None:
        async for notice in notices:
            match notice:
                case Assigned(execution_id=execution_id, token=token, execution=execution):
                    if execution is not None:
                        self._adopt(Owned(token, execution), group)
                    else:
                        group.create_task(self._load(execution_id, token, group))
                case Appended(execution_id=execution_id, events=events):
                    held = self._held.get(execution_id)
                    if held is not None and held.driver is not None:
                        held.driver.notify(events)
                case ReadyRang(partition=partition):
                    self._claim_soon(partition, group)
                case OutboxRang(partition=partition):
                    self._relay_soon(partition, group)
                case DeliveriesDue():
                    pass  # a dispatcher's; no worker subscribes to it
                case Resubscribed():
                    self._mismatched.update(self._partitions)
                    self._next_beat_ms = dict.fromkeys(self._partitions, 0)
                    self._timer_set.set()
                    group.create_task(self._tell_missed())

    async def _sweep(self) -> None:
        while True:
            await self._runtime.clock.sleep(SWEEP_S)
            await self._tell_missed()

    async def _tell_missed(self) -> None:
        """Tell drivers what others appended and no bell rang for: a cancel, or a new owner's work.

        A commit of the driver's own may be among it; the driver drops what it has.
        """
        store = self._runtime.store
        drivers = {eid: held.driver for eid, held in self._held.items() if held.driver is not None}
        try:
            last_seqs = await store.last_seqs(tuple(drivers))
            for execution_id, last_seq in last_seqs.items():
                driver = drivers[execution_id]
                if last_seq > driver.execution.seq:
                    missed = await store.read(execution_id, driver.execution.seq, MISSED_MAX)
                    driver.notify(tuple(missed))
        except StoreUnavailableError:
            logger.exception("sweep failed", extra={"worker_id": self.worker_id})

    async def _beat(self, group: asyncio.TaskGroup) -> None:
        clock = self._runtime.clock
        while True:
            self._timer_set.clear()
            now_ms = clock.now_ms()
            due = [p for p in self._partitions if self._next_beat_ms[p] <= now_ms]
            try:
                beats = await asyncio.gather(*(self._beat_once(p) for p in due))
            except StoreUnavailableError:
                logger.exception("heartbeat failed", extra={"worker_id": self.worker_id})
                self.beat_at_s = clock.monotonic_s()  # the store is ill, not this worker
                await clock.sleep(self._limits.heartbeat_ms / 1000)
                continue
            self.beat_at_s = clock.monotonic_s()
            for partition, beat in zip(due, beats, strict=True):
                self._heed(partition, beat, group)
            wait_ms = min(self._next_beat_ms.values()) - clock.now_ms()
            await self._sleep(max(1, wait_ms) / 1000)

    async def _beat_once(self, partition: int) -> Heartbeat:
        limits = self._limits
        return await self._runtime.store.heartbeat(
            partition, self.worker_id, limits.lease_ttl_ms, self._share
        )

    async def _sleep(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._timer_set.wait()
        except TimeoutError:
            return

    def _heed(self, partition: int, beat: Heartbeat, group: asyncio.TaskGroup) -> None:
        now_ms = self._runtime.clock.now_ms()
        next_ms = now_ms + self._limits.heartbeat_ms
        if beat.next_timer_ms is not None:
            # The timer is in the server's time; only the difference counts here.
            next_ms = min(next_ms, now_ms + max(1, beat.next_timer_ms - beat.now_ms))
        self._next_beat_ms[partition] = next_ms
        if beat.ready_depth:
            self._claim_soon(partition, group)
        if beat.outbox_length:
            self._relay_soon(partition, group)
        self._check_owned(partition, beat.owned_count, group)
        peers = frozenset(beat.workers) - {self.worker_id}
        if partition == 0 and peers != self.peers:
            self.peers = peers
            self._peers_changed.set()

    def _check_owned(self, partition: int, owned_count: int, group: asyncio.TaskGroup) -> None:
        """A push may be lost: two beats in a row that disagree, and the list is read."""
        if owned_count == self._held_counts[partition]:
            self._mismatched.discard(partition)
        elif partition in self._mismatched:
            self._mismatched.discard(partition)
            group.create_task(self._resync(partition, group))
        else:
            self._mismatched.add(partition)

    def _claim_soon(self, partition: int, group: asyncio.TaskGroup) -> None:
        if partition not in self._is_claiming and self.owned_count < self._limits.capacity:
            self._is_claiming.add(partition)
            group.create_task(self._claim(partition, group))

    async def _claim(self, partition: int, group: asyncio.TaskGroup) -> None:
        try:
            room = min(CLAIM_MAX, self._share - self._held_counts[partition])
            if room > 0:
                claimed = await self._runtime.store.claim(partition, self.worker_id, room)
                self._adopt_all(claimed, group)
        except StoreUnavailableError:
            logger.exception("claim failed", extra={"worker_id": self.worker_id})
        finally:
            self._is_claiming.discard(partition)

    async def _resync(self, partition: int, group: asyncio.TaskGroup) -> None:
        try:
            self._adopt_all(await self._runtime.store.owned(partition, self.worker_id), group)
        except StoreUnavailableError:
            logger.exception("resync failed", extra={"worker_id": self.worker_id})

    async def _load(self, execution_id: str, token: str, group: asyncio.TaskGroup) -> None:
        try:
            execution = await self._runtime.store.load(execution_id)
        except StoreUnavailableError:
            logger.exception("load failed", extra={"execution_id": execution_id})
            return  # the heartbeat's count shows that it is missing
        if execution is not None:
            self._adopt(Owned(token, execution), group)

    def _relay_soon(self, partition: int, group: asyncio.TaskGroup) -> None:
        """Empty the partition's outbox: one relay at a time, and again for what came meanwhile."""
        if partition in self._relaying:
            self._relaying[partition] = True
        else:
            self._relaying[partition] = False
            group.create_task(self._relay(partition))

    async def _relay(self, partition: int) -> None:
        try:
            is_more = True
            while is_more:
                self._relaying[partition] = False
                relayed = await self._runtime.store.relay(partition, RELAY_BATCH)
                is_more = relayed == RELAY_BATCH or self._relaying[partition]
        except Exception:  # one message's fault must not stop the worker; the next beat tries again
            logger.exception("relay failed", extra={"worker_id": self.worker_id})
        finally:
            del self._relaying[partition]

    def _adopt_all(self, owned: Sequence[Owned], group: asyncio.TaskGroup) -> None:
        for one in owned:
            self._adopt(one, group)

    def _adopt(self, owned: Owned, group: asyncio.TaskGroup) -> None:
        execution_id = owned.execution.id
        present = self._held.get(execution_id)
        if present is not None and present.token == owned.token:
            return
        if present is not None:
            self._let_go(execution_id, present)
            if present.task is not None:
                present.task.cancel()  # its token is an older one: it could only fail
        partition = partition_of(execution_id, len(self._partitions))
        assert partition is not None, "the store hands out its own ids only"
        held = self._held[execution_id] = _Holding(owned.token, partition)
        self._held_counts[partition] += 1
        held.task = group.create_task(self._drive(owned, held, group))

    async def _drive(self, owned: Owned, held: _Holding, group: asyncio.TaskGroup) -> None:
        created = owned.execution.created
        execution_id = owned.execution.id
        try:
            workflow = await self._catalog.version(
                created.workspace, created.workflow_id, created.workflow_version
            )
            held.driver = Driver(
                owned, workflow, self._runtime, lambda: self._relay_soon(held.partition, group)
            )
            await held.driver.drive()
        except ServeAppError:
            logger.exception("cannot drive", extra={"execution_id": execution_id})
        except Exception:  # one execution's fault must not stop the worker; its lease shows it
            logger.exception("driver broke", extra={"execution_id": execution_id})
        finally:
            self._let_go(execution_id, held)
        if held.driver is not None:
            self._after(held.driver, held.partition, group)

    def _let_go(self, execution_id: str, held: _Holding) -> None:
        if self._held.get(execution_id) is held:
            del self._held[execution_id]
            self._held_counts[held.partition] -= 1

    def _after(self, driver: Driver, partition: int, group: asyncio.TaskGroup) -> None:
        if driver.ready_depth:
            self._claim_soon(partition, group)
        if driver.execution.wake_at_ms is not None:
            self._next_beat_ms[partition] = min(
                self._next_beat_ms[partition], driver.execution.wake_at_ms
            )
            self._timer_set.set()

    async def _hand_over(self) -> None:
        """Give up every lease, so that nobody has to wait for it to run out."""
        try:
            await asyncio.gather(
                *(self._runtime.store.reap(p, self.worker_id) for p in self._partitions)
            )
        except StoreUnavailableError:
            logger.exception("hand-over failed", extra={"worker_id": self.worker_id})

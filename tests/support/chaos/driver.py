"""The clients: they start executions, answer waits, cancel and read streams, and note it all.

A client that gets no answer asks again, as clients do, under the same key where it starts
something. Only what was answered counts as promised.
"""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from serve_app.core.children import child_id
from serve_app.core.errors import (
    AlreadyTerminalError,
    OverloadedError,
    RateLimitExceededError,
    StoreUnavailableError,
    UnknownExecutionError,
)
from serve_app.services.executions import Submission
from tests.support.chaos.generator import Planned
from tests.support.chaos.ledger import Ledger
from tests.support.chaos.oracle import Ask, Oracle
from tests.support.chaos.world import PARTITIONS, WORKSPACE, World
from tests.support.checker import TERMINAL_KINDS, Entry

ANSWER_DELAY_S = 1.5  # at most, from the acceptance to a signal
Value = TypeVar("Value")
AWAY = (StoreUnavailableError, OverloadedError, RateLimitExceededError)


class Driver(ABC):
    """All clients of one run, whatever they speak."""

    def __init__(self, ledger: Ledger, oracle: Oracle, seed: int, partition_count: int) -> None:
        self._ledger = ledger
        self.oracle = oracle
        self._partition_count = partition_count
        self._rng = random.Random(seed)

    @abstractmethod
    async def start(self, plan: Planned) -> str:
        """Start an execution under the plan's key; its id."""

    @abstractmethod
    async def has_ended(self, execution_id: str) -> bool:
        """Whether it is in a terminal state."""

    @abstractmethod
    async def cancel(self, execution_id: str) -> None:
        """Ask for its end."""

    @abstractmethod
    async def signal(self, execution_id: str, ask: Ask) -> None:
        """Answer one of its waits."""

    @abstractmethod
    async def read(self, execution_id: str, cursor: int) -> AsyncIterator[Entry]:
        """Some events after a cursor; it may end at any time."""
        yield Entry(0, "")

    async def submit(self, plans: list[Planned], over_s: float, until_s: float) -> None:
        """Start all, evenly over a time, and stay until every client is done."""
        async with asyncio.timeout(until_s), asyncio.TaskGroup() as clients:
            for plan in plans:
                clients.create_task(self._play(plan))
                await asyncio.sleep(over_s / len(plans))

    async def _play(self, plan: Planned) -> None:
        execution_id = await self._accept(plan)
        self._ledger.accepted[execution_id] = plan
        self._ledger.write("accepted", id=execution_id, workflow=plan.workflow_id)
        async with asyncio.TaskGroup() as clients:
            if plan.is_followed:
                clients.create_task(self._read(execution_id))
            if plan.cancel_after_s is not None:
                clients.create_task(self._cancel(execution_id, plan.cancel_after_s))
            for ask in self.oracle.expected(plan.workflow_id, plan.input).asks:
                clients.create_task(self._signal(execution_id, ask))
            clients.create_task(self._until_ended(execution_id))

    async def _accept(self, plan: Planned) -> str:
        begun_s = asyncio.get_running_loop().time()
        execution_id = await self._insist(lambda: self.start(plan))
        self._ledger.accept_s.append(asyncio.get_running_loop().time() - begun_s)
        return execution_id

    async def _until_ended(self, execution_id: str) -> None:
        while not await self._insist(lambda: self.has_ended(execution_id)):
            await asyncio.sleep(0.25)

    async def _cancel(self, execution_id: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._ledger.cancel_tried.add(execution_id)
        try:
            await self._insist(lambda: self.cancel(execution_id))
        except AlreadyTerminalError:
            return
        self._ledger.cancelled.add(execution_id)
        self._ledger.write("cancelled", id=execution_id)

    async def _signal(self, parent_id: str, ask: Ask) -> None:
        """Answer a wait, of the execution itself or of a child that may not be there yet."""
        await asyncio.sleep(self._rng.uniform(0, ANSWER_DELAY_S))
        execution_id = family_member(parent_id, ask.family, self._partition_count)
        while True:
            try:
                await self._insist(lambda: self.signal(execution_id, ask))
            except AlreadyTerminalError:
                return
            except UnknownExecutionError:
                if await self._insist(lambda: self.has_ended(parent_id)):
                    return
                await asyncio.sleep(0.1)
            else:
                self._ledger.signalled.append((execution_id, ask.name))
                self._ledger.write("signalled", id=execution_id, name=ask.name)
                return

    async def _read(self, execution_id: str) -> None:
        """Follow a stream to its end, leaving and coming back with the cursor."""
        cursor, is_done = 0, False
        while not is_done:
            try:
                async with asyncio.timeout(self._rng.uniform(0.5, 6)):
                    async for entry in self.read(execution_id, cursor):
                        cursor = entry.seq
                        self._ledger.views[execution_id].append(entry)
                        is_done = entry.kind in TERMINAL_KINDS
            except (*AWAY, TimeoutError):
                self._ledger.notes["readers cut off"] += 1

    async def _insist(self, call: Callable[[], Awaitable[Value]]) -> Value:
        while True:
            try:
                return await call()
            except AWAY:
                self._ledger.notes["calls repeated"] += 1
                await asyncio.sleep(0.2)


class OwnDriver(Driver):
    """Clients of the services in this process."""

    def __init__(self, world: World, oracle: Oracle, seed: int) -> None:
        super().__init__(world.ledger, oracle, seed, PARTITIONS)
        self._executions = world.services.executions
        self._feeds = world.services.feeds

    async def start(self, plan: Planned) -> str:
        execution_id = self._executions.new_id(WORKSPACE, "chaos", plan.key)
        submission = Submission(
            execution_id=execution_id,
            workspace=WORKSPACE,
            workflow_id=plan.workflow_id,
            input=plan.input,
            idempotency_key=plan.key,
            request_hash=plan.key,
            priority=plan.priority,
        )
        await self._executions.start(submission)
        return execution_id

    async def has_ended(self, execution_id: str) -> bool:
        return (await self._executions.load(WORKSPACE, execution_id)).is_terminal

    async def cancel(self, execution_id: str) -> None:
        await self._executions.cancel(WORKSPACE, execution_id, "the chaos wants it")

    async def signal(self, execution_id: str, ask: Ask) -> None:
        await self._executions.signal(WORKSPACE, execution_id, ask.name, ask.data)

    async def read(self, execution_id: str, cursor: int) -> AsyncIterator[Entry]:
        async with self._executions.follow(WORKSPACE, execution_id) as feed:
            while True:
                frames = await self._feeds.next_frames(feed, cursor)
                if not frames:
                    return
                cursor = frames[-1][0]
                for seq, frame in frames:
                    if frame is not None:
                        yield Entry(seq, _kind(frame))


def family_member(execution_id: str, family: tuple[str, ...], partition_count: int) -> str:
    """The id of a child of a child, by the steps that lead there."""
    for path in family:
        execution_id = child_id(partition_count, execution_id, path, 1)
    return execution_id


def _kind(frame: bytes) -> str:
    for line in frame.decode().splitlines():
        if line.startswith("event: "):
            return line.removeprefix("event: ")
    raise AssertionError(f"a frame without an event: {frame[:100]!r}")

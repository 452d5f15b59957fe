"""The hub: each event is rendered once per process and shared by all who read it there.

Owns the executions that somebody follows in this process: their state, and the rendered frames of
their latest events. Knows no wire format (the renderer comes in). Invariants: a reader holds a
cursor, never a queue, so a slow one costs nothing and is cut over to reading the journal; bells
are hints, so every gap in the sequence, every renewed subscription and one sweep a second is
answered by reading the journal.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from serve_app.core.errors import StoreUnavailableError
from serve_app.core.execution import Execution, ExecutionCreated, Folding
from serve_app.core.journal import Appended, Notice, Resubscribed, StoredEvent
from serve_app.ports import Bells, Clock, ExecutionStore

logger = logging.getLogger(__name__)

FRAMES_MAX = 512  # rendered frames kept per feed; an older cursor reads the journal
PAGE_MAX = 512  # events per read of a journal
SWEEP_S = 1.0  # a lost last bell costs so much, not for ever

# None: the event is not for the reader. The state is the one after the event.
Render = Callable[[StoredEvent, Execution], bytes | None]


class _Frame:
    """An event's bytes, made when the first reader wants them: who awaits a result wants none."""

    __slots__ = ("_made_of", "_shown", "seq")

    def __init__(self, stored: StoredEvent, execution: Execution) -> None:
        self.seq = stored.seq
        self._made_of: tuple[StoredEvent, Execution] | None = (stored, execution)
        self._shown: bytes | None = None

    def shown(self, render: Render) -> bytes | None:
        if self._made_of is not None:
            self._shown = render(*self._made_of)
            self._made_of = None
        return self._shown


class Feed:
    """One followed execution."""

    def __init__(self, execution: Execution, render: Render) -> None:
        self.execution = execution
        self.readers = 0
        self._render = render
        self._frames: deque[_Frame] = deque(maxlen=FRAMES_MAX)
        self._waiters: set[asyncio.Future[None]] = set()

    def begin(self, first: StoredEvent) -> None:
        """Keep the frame of the event that made the execution."""
        self._frames.append(_Frame(first, self.execution))

    def settle(self, created: ExecutionCreated) -> None:
        """Say what was accepted: of two requests under one key, the other may have begun this."""
        self.execution = replace(self.execution, created=created)

    def fold(self, events: Sequence[StoredEvent]) -> bool:
        """Take what follows directly; False when something between is missing."""
        folding = Folding(self.execution)
        for stored in events:
            if stored.seq == folding.execution.seq + 1:
                folding.add(stored.event)
                self._frames.append(_Frame(stored, folding.execution))
            elif stored.seq > folding.execution.seq:
                break
        self.execution = folding.execution
        self._wake()
        return not events or events[-1].seq <= self.execution.seq

    def frames_after(self, cursor: int) -> list[tuple[int, bytes | None]] | None:
        """What the ring holds after a cursor; None when the cursor is older than the ring."""
        first = self._frames[0].seq if self._frames else self.execution.seq + 1
        if cursor < first - 1:
            return None
        return [(f.seq, f.shown(self._render)) for f in self._frames if f.seq > cursor]

    def render(self, stored: StoredEvent) -> bytes | None:
        """Render an event that is not in the ring any more."""
        return self._render(stored, self.execution)

    async def changed(self, seq: int) -> None:
        """Wait until there is more than `seq`."""
        while self.execution.seq <= seq and not self.execution.is_terminal:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:  # readers come back every few seconds of silence; the event may never come
                self._waiters.discard(waiter)

    async def ended(self) -> Execution:
        """Wait for the terminal event."""
        while not self.execution.is_terminal:
            await self.changed(self.execution.seq)
        return self.execution

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Feeds:
    """All feeds of one process, kept up to date by one subscription."""

    def __init__(
        self, watcher_id: str, store: ExecutionStore, bells: Bells, clock: Clock, render: Render
    ) -> None:
        self.watcher_id = watcher_id
        self._store = store
        self._bells = bells
        self._clock = clock
        self._render = render
        self._feeds: dict[str, Feed] = {}
        self._behind: set[str] = set()
        self._is_behind = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with self._bells.listen() as notices, asyncio.TaskGroup() as group:
            group.create_task(self._hear(notices))
            group.create_task(self._catch_up())
            group.create_task(self._sweep())

    @asynccontextmanager
    async def begin(self, execution: Execution, first: StoredEvent) -> AsyncIterator[Feed]:
        """Follow an execution that this process is about to create, from its first event on."""
        feed = self._feeds.get(execution.id)
        if feed is None:
            feed = self._feeds[execution.id] = Feed(execution, self._render)
            feed.begin(first)
        async with self._held(feed):
            yield feed

    @asynccontextmanager
    async def follow(self, execution_id: str) -> AsyncIterator[Feed | None]:
        """Follow an execution that exists; None when it does not."""
        feed = self._feeds.get(execution_id)
        if feed is None:
            execution = await self._store.watch(execution_id, self.watcher_id)
            if execution is None:
                yield None
                return
            feed = self._feeds.setdefault(execution_id, Feed(execution, self._render))
            if not execution.is_terminal:
                self._is_late(execution_id)  # what was rung before the feed stood here
        async with self._held(feed):
            yield feed

    async def next_frames(self, feed: Feed, cursor: int) -> list[tuple[int, bytes | None]]:
        """Wait for frames after a cursor; empty when the execution has ended before it.

        Holds no state, so it may be cancelled and called again.
        """
        while True:
            frames = feed.frames_after(cursor)
            if frames is None:
                page = await self._store.read(feed.execution.id, cursor, PAGE_MAX)
                feed.fold(page)  # the terminal event is rendered with the state it gives
                return [(stored.seq, feed.render(stored)) for stored in page]
            if frames or feed.execution.is_terminal:
                return frames
            await feed.changed(cursor)

    @asynccontextmanager
    async def _held(self, feed: Feed) -> AsyncIterator[None]:
        feed.readers += 1
        try:
            yield
        finally:
            feed.readers -= 1
            if feed.readers == 0 and self._feeds.get(feed.execution.id) is feed:
                del self._feeds[feed.execution.id]

    async def _hear(self, notices: AsyncIterator[Notice]) -> None:
        async for notice in notices:
            match notice:
                case Appended(execution_id=execution_id, last_seq=last_seq, events=events):
                    feed = self._feeds.get(execution_id)
                    if (
                        feed is not None
                        and last_seq > feed.execution.seq
                        and not (events and feed.fold(events))
                    ):
                        self._is_late(execution_id)
                case Resubscribed():
                    for execution_id in self._feeds:
                        self._is_late(execution_id)
                case _:
                    continue

    async def _sweep(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_S)
            if not self._feeds:
                continue
            try:
                last_seqs = await self._store.last_seqs(tuple(self._feeds))
            except StoreUnavailableError:
                logger.exception("sweep failed")
                continue
            for execution_id, last_seq in last_seqs.items():
                feed = self._feeds.get(execution_id)
                if feed is not None and last_seq > feed.execution.seq:
                    self._is_late(execution_id)

    def _is_late(self, execution_id: str) -> None:
        self._behind.add(execution_id)
        self._is_behind.set()

    async def _catch_up(self) -> None:
        while True:
            await self._is_behind.wait()
            self._is_behind.clear()
            while self._behind:
                execution_id = self._behind.pop()
                try:
                    await self._read_missing(execution_id)
                except StoreUnavailableError:
                    logger.exception("catch-up failed", extra={"execution_id": execution_id})

    async def _read_missing(self, execution_id: str) -> None:
        while (feed := self._feeds.get(execution_id)) is not None:
            page = await self._store.read(execution_id, feed.execution.seq, PAGE_MAX)
            feed.fold(page)
            if len(page) < PAGE_MAX:
                return

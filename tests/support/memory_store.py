"""A store and bells in dictionaries, with the answers of the real ones and faults on demand."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

from serve_app.adapters.event_codec import decode_event, encode_event
from serve_app.core.execution import (
    Event,
    Execution,
    ExecutionCreated,
    Status,
    evolve,
    new_execution,
)
from serve_app.core.journal import (
    Appended,
    Commit,
    CommitAnswer,
    Committed,
    Conflict,
    Notice,
    Outgoing,
    Owned,
    Stale,
    StoredEvent,
)
from serve_app.ports import Accepted

Hook = Callable[[Commit], Awaitable[None]]


class MemoryStore:
    """One partition. Events go through the codec, so that a reader gets what a journal gives.

    `before` and `after` hold hooks, each called around one commit, in order; a hook may wait,
    append something first, or raise what the caller of the commit shall get.
    """

    partition_count = 1

    def __init__(self) -> None:
        self.journals: dict[str, list[StoredEvent]] = {}
        self.states: dict[str, Execution] = {}
        self.owners: dict[str, str] = {}
        self.watched: list[tuple[str, str]] = []
        self.reads: list[tuple[str, int]] = []
        self.outbox: list[Outgoing] = []
        self.before: deque[Hook] = deque()
        self.after: deque[Hook] = deque()
        self.is_down: Exception | None = None

    async def create(
        self,
        execution_id: str,
        created: ExecutionCreated,
        commit_id: str,
        watcher: str,
        start_at_ms: int = 0,
    ) -> Accepted:
        if execution_id in self.states:
            return Accepted(False, self.states[execution_id])
        self.states[execution_id] = new_execution(execution_id, created)
        self.journals[execution_id] = [StoredEvent(1, commit_id, created)]
        self.owners[execution_id] = ""
        return Accepted(True, self.states[execution_id])

    def own(self, execution_id: str, token: str) -> Owned:
        """Hand an execution to a worker."""
        self.owners[execution_id] = token
        return Owned(token, self.states[execution_id])

    async def commit(self, commit: Commit) -> CommitAnswer:
        if self.before:
            await self.before.popleft()(commit)
        answer = self._apply(commit)
        if self.after:
            await self.after.popleft()(commit)
        return answer

    def append(self, execution_id: str, *events: Event, commit_id: str = "other") -> Appended:
        """Events by somebody else than the owner; the notice that would be rung."""
        state, journal = self.states[execution_id], self.journals[execution_id]
        first_seq = state.seq + 1
        for event in events:
            kept = decode_event(*encode_event(event))
            state = evolve(state, kept)
            journal.append(StoredEvent(state.seq, commit_id, kept))
        self.states[execution_id] = state
        return Appended(execution_id, first_seq, state.seq, tuple(journal[first_seq - 1 :]))

    async def load(self, execution_id: str) -> Execution | None:
        self._check()
        return self.states.get(execution_id)

    async def read(self, execution_id: str, after: int, limit: int) -> Sequence[StoredEvent]:
        self.reads.append((execution_id, after))
        await asyncio.sleep(0)
        self._check()
        return tuple(self.journals.get(execution_id, ())[after : after + limit])

    async def watch(self, execution_id: str, watcher: str) -> Execution | None:
        self._check()
        self.watched.append((execution_id, watcher))
        return self.states.get(execution_id)

    async def live_workers(self) -> int:
        return 1

    async def last_seqs(self, execution_ids: Collection[str]) -> Mapping[str, int]:
        self._check()
        return {eid: self.states[eid].seq for eid in execution_ids if eid in self.states}

    def events(self, execution_id: str) -> list[Event]:
        """All events of a journal."""
        return [stored.event for stored in self.journals[execution_id]]

    def _apply(self, commit: Commit) -> CommitAnswer:
        execution_id = commit.after.id
        if execution_id not in self.states:
            return Stale()
        is_fenced = commit.token is not None and commit.token != self.owners[execution_id]
        if commit.before.seq != self.states[execution_id].seq:
            missed = tuple(self.journals[execution_id][commit.before.seq :])
            is_ours = missed[0].commit_id == commit.commit_id
            return Stale() if is_fenced and not is_ours else Conflict(missed, is_ours)
        if is_fenced:
            return Stale()
        self.append(execution_id, *commit.events, commit_id=commit.commit_id)
        self.outbox += commit.outgoing
        assert self.states[execution_id] == commit.after, "the snapshot is the fold of the journal"
        is_let_go = commit.after.is_terminal or commit.after.status is Status.WAITING
        if commit.token is not None and is_let_go:
            self.owners[execution_id] = ""
        return Committed(ready_depth=0)

    def _check(self) -> None:
        if self.is_down is not None:
            raise self.is_down


class MemoryBells:
    """Notices that a test rings by hand."""

    def __init__(self) -> None:
        self.notices: asyncio.Queue[Notice] = asyncio.Queue()
        self.is_heard = asyncio.Event()

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        self.is_heard.set()
        yield self._stream()

    def ring(self, notice: Notice) -> None:
        self.notices.put_nowait(notice)

    async def _stream(self) -> AsyncIterator[Notice]:
        while True:
            yield await self.notices.get()

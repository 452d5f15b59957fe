"""The store and a reference model are driven by the same random commands and must agree."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from serve_app.core.execution import (
    CancelRequested,
    ChunkEmitted,
    Event,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionCreated,
    ExecutionParked,
    ExecutionResumed,
    ExecutionStarted,
    Status,
    StepCompleted,
    StepRetrying,
    StepStarted,
    evolve,
    new_execution,
)
from serve_app.core.journal import Commit, Committed, Conflict, Outgoing, Stale, execution_id
from tests.integration.conftest import open_store
from tests.support.store_model import Journal, StoreModel

PARTITION = 1
CAPACITY = 3
WORKERS = ("w-one", "w-two", "w-three")
FAR_MS = 4_000_000_000_000
NEVER_MS = 3_600_000


def next_events(status: Status) -> tuple[tuple[Event, ...], ...]:
    """Legal continuations of a status, one of which a worker commits."""
    run = (StepStarted(1, "s", 1), StepCompleted(2, "s", {"text": "é", "n": 1.5}))
    return {
        Status.PENDING: (
            (ExecutionStarted(1), *run),
            (ExecutionStarted(1), StepStarted(1, "s", 1)),
        ),
        Status.RUNNING: (
            (ExecutionCompleted(9, [1, None, "x"]),),
            (ExecutionParked(3, FAR_MS),),
            (ExecutionParked(3, 0),),
        ),
        Status.WAITING: ((ExecutionResumed(5),),),
        Status.CANCELLING: ((ExecutionCancelled(9, "asked"),),),
    }[status]


class StoreMachine(RuleBasedStateMachine):
    url = ""
    executions = Bundle("executions")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.bench = open_store(self.url)
        self.model = StoreModel(CAPACITY)
        self.count = 0
        self.run(self.bench.client.flushall())

    def teardown(self) -> None:
        self.run(self.bench.calls.close())
        self.run(self.bench.client.aclose())
        self.runner.close()

    def run(self, work: Any) -> Any:
        async def once() -> Any:
            return await work

        return self.runner.run(once())

    def owner(self, eid: str) -> str:
        value = self.run(self.bench.client.hget(f"ip:{{{PARTITION}}}:s:{eid}", "owner"))
        return value.decode()

    def unique(self) -> str:
        self.count += 1
        return f"n{self.count}"

    @rule(
        target=executions, priority=st.integers(-100, 100), workspace=st.sampled_from(("ws", "wt"))
    )
    def create(self, priority: int, workspace: str) -> str:
        eid = execution_id(PARTITION, self.unique())
        created = ExecutionCreated(0, workspace, "wf", 1, {"deep": [1]}, priority=priority)
        accepted = self.run(self.bench.store.create(eid, created, "create", "ingress"))
        assert accepted.is_new
        self.model.journals[eid] = Journal(new_execution(eid, created), [("create", created)])
        self.model.assign(eid, self.owner(eid), is_new=True)
        return eid

    @rule(eid=executions)
    def create_again(self, eid: str) -> None:
        created = ExecutionCreated(7, "other", "wf", 2, None)
        accepted = self.run(self.bench.store.create(eid, created, "create", "ingress"))
        assert not accepted.is_new
        assert accepted.execution == self.model.journals[eid].execution

    @rule(worker=st.sampled_from(WORKERS))
    def live(self, worker: str) -> None:
        self.run(self.bench.store.heartbeat(PARTITION, worker, NEVER_MS, CAPACITY))
        self.model.live.add(worker)
        self.settle()

    @rule(worker=st.sampled_from(WORKERS))
    def reap(self, worker: str) -> None:
        self.run(self.bench.store.reap(PARTITION, worker))
        self.model.live.discard(worker)
        for eid in self.model.owned_by(worker):
            self.model.release(eid)
        self.settle()

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), limit=st.integers(1, 4))
    def claim(self, data: Any, limit: int) -> None:
        worker = data.draw(st.sampled_from(sorted(self.model.live)))
        claimed = self.run(self.bench.store.claim(PARTITION, worker, limit))
        ready = {eid for eid, journal in self.model.journals.items() if journal.is_ready}
        assert len(claimed) == min(limit, len(ready))
        for owned in claimed:
            journal = self.model.journals[owned.execution.id]
            assert owned.execution == journal.execution
            assert journal.is_ready
            journal.owner, journal.is_ready = owned.token, False

    @rule(eid=executions, data=st.data(), is_stale=st.booleans(), is_late=st.booleans())
    def commit(self, eid: str, data: Any, is_stale: bool, is_late: bool) -> None:
        journal = self.model.journals[eid]
        before = journal.execution
        if before.is_terminal or not journal.owner:
            return
        events = data.draw(st.sampled_from(next_events(before.status)))
        after = before
        for event in events:
            after = evolve(after, event)
        token = "nobody/0" if is_stale else journal.owner
        base = before
        if is_late:
            base = new_execution(eid, before.created)  # as one that missed everything since
        commit = Commit(self.unique(), token, base, after, events)
        answer = self.run(self.bench.store.commit(commit))
        if is_stale:
            assert answer == Stale()
        elif is_late and base.seq != before.seq:
            assert isinstance(answer, Conflict)
            assert [(e.commit_id, e.event) for e in answer.missed] == journal.entries[base.seq :]
        else:
            assert isinstance(answer, Committed)
            self.accept(eid, commit)
            again = self.run(self.bench.store.commit(commit))
            assert isinstance(again, Conflict)
            assert again.is_ours

    @rule(eid=executions)
    def ask_to_cancel(self, eid: str) -> None:
        journal = self.model.journals[eid]
        before = journal.execution
        if before.is_terminal or before.status is Status.CANCELLING:
            return
        events = (CancelRequested(4, "asked"),)
        commit = Commit(self.unique(), None, before, evolve(before, events[0]), events)
        was_owned = bool(journal.owner)
        assert isinstance(self.run(self.bench.store.commit(commit)), Committed)
        self.accept(eid, commit)
        if not was_owned:
            journal.timer_ms = None
            self.model.assign(eid, self.owner(eid))

    @rule()
    def relay(self) -> None:
        self.run(self.bench.store.relay(PARTITION, 100))
        self.model.delivered |= set(self.model.outbox)
        self.model.outbox.clear()

    @rule(eid=executions)
    def emit_chunk_with_message(self, eid: str) -> None:
        journal = self.model.journals[eid]
        before = journal.execution
        step = before.steps.get("s")
        if before.status is not Status.RUNNING or not journal.owner or step is None:
            return
        if step.status != "running":
            return
        message_id = f"m{before.seq % 3}"  # repeats on purpose: the target must drop the copy
        events = (
            ChunkEmitted(3, "s", "tok", (1, 2)),
            StepRetrying(3, "s", 1, 1, 0, "lost"),
            StepStarted(3, "s", 1),
        )
        after = before
        for event in events:
            after = evolve(after, event)
        outgoing = (Outgoing(message_id, 2, "feed", b"body"),)
        commit = Commit(self.unique(), journal.owner, before, after, events, outgoing)
        assert isinstance(self.run(self.bench.store.commit(commit)), Committed)
        self.accept(eid, commit)
        self.model.outbox.append(message_id)

    def accept(self, eid: str, commit: Commit) -> None:
        journal = self.model.journals[eid]
        journal.execution = commit.after
        journal.entries += [(commit.commit_id, event) for event in commit.events]
        if commit.token is not None and commit.after.is_terminal:
            journal.owner = ""
        elif commit.token is not None and commit.after.status is Status.WAITING:
            journal.owner, journal.timer_ms = "", commit.after.wake_at_ms

    def settle(self) -> None:
        """Follow the store where it handed work out: any order within one call is right."""
        for eid, journal in self.model.journals.items():
            token = self.owner(eid)
            if token != journal.owner or (journal.timer_ms or FAR_MS) < FAR_MS:
                worker = token.rpartition("/")[0]
                assert not token or worker in self.model.live
                journal.owner = token
                journal.timer_ms = None
            if not token and not journal.execution.is_terminal and journal.timer_ms is None:
                journal.is_ready = True

    @invariant()
    def states_agree(self) -> None:
        for eid, journal in self.model.journals.items():
            assert self.run(self.bench.store.load(eid)) == journal.execution
            stored = self.run(self.bench.store.read(eid, 0, 1000))
            assert [(e.commit_id, e.event) for e in stored] == journal.entries
            assert [e.seq for e in stored] == list(range(1, len(journal.entries) + 1))
            assert self.owner(eid) == journal.owner

    @invariant()
    def queues_agree(self) -> None:
        prefix = f"ip:{{{PARTITION}}}"
        lines = self.run(self.bench.keys(f"{prefix}:line:*"))
        ready = {
            m.decode() for line in lines for m in self.run(self.bench.client.zrange(line, 0, -1))
        }
        assert len(ready) == int(self.run(self.bench.client.get(f"{prefix}:depth")) or 0)
        assert ready == {
            eid for eid, j in self.model.journals.items() if j.is_ready and not j.owner
        }
        for worker in WORKERS:
            owned = self.run(self.bench.client.smembers(f"{prefix}:owned:{worker}"))
            assert {m.decode() for m in owned} == self.model.owned_by(worker)
        delivered = self.run(self.bench.client.xlen("ip:{2}:log:feed"))
        assert delivered == len(self.model.delivered)

    @invariant()
    def every_live_execution_can_go_on(self) -> None:
        """Owned, on the queue, or on a timer: never lost between them."""
        for journal in self.model.journals.values():
            if not journal.execution.is_terminal:
                held = (bool(journal.owner), journal.is_ready, journal.timer_ms is not None)
                assert sum(held) == 1, held


@pytest.mark.timeout(180)
def test_store_agrees_with_the_model(store_url: str) -> None:
    StoreMachine.url = store_url
    machine = StoreMachine.TestCase
    machine.settings = settings(
        # The commands are the same ones; on a cluster it is the way to them that is tried.
        max_examples=10 if "," in store_url else 40,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine().runTest()

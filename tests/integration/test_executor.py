"""Executors on a real Valkey, without Ray: what is promised when workers and networks fail.

Longer than a file should be: one bench serves every story, and they read best side by side.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from serve_app.adapters.redis_bells import RedisBells, worker_channels
from serve_app.adapters.redis_connect import RedisConnections, connect
from serve_app.adapters.redis_nodes import RedisNodes
from serve_app.adapters.redis_store import RedisStore
from serve_app.core import journal
from serve_app.core.errors import (
    AlreadyTerminalError,
    IdempotencyConflictError,
    OverloadedError,
    StepFailedError,
    StoreUnavailableError,
    UnknownExecutionError,
)
from serve_app.core.execution import Execution, Status
from serve_app.core.inference import JsonValue
from serve_app.core.journal import (
    Assigned,
    Commit,
    CommitAnswer,
    Committed,
    Notice,
    ReadyRang,
)
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.core.workflow import Workflow
from serve_app.ports import Bells, StepCall, StepType
from serve_app.services.executions import Executions, Started, Submission
from serve_app.services.executor import Executor, WorkerLimits
from serve_app.services.feeds import Feeds
from serve_app.services.planner import Runtime
from serve_app.settings import Settings
from tests.integration.conftest import ONE_SERVER
from tests.support.checker import (
    Entry,
    entries_of_stored,
    journal_problems,
    loss_and_repetition,
    view_problems,
)
from tests.support.harness import PARTITIONS, Harness
from tests.support.tcp_proxy import TcpProxy
from tests.support.valkey_cluster import raw_client

WITHIN_S = 10.0
LEASE_MS = 600
BEAT_MS = 100
LIMITS = WorkerLimits(LEASE_MS, BEAT_MS, 512)
WORKSPACE = "default"
THREE = {
    "id": "three",
    "steps": [{"id": "one", "work": {}}, {"id": "two", "work": {}}, {"id": "last", "work": {}}],
}
PAIR = {
    "id": "pair",
    "steps": [{"id": "left", "work": {}}, {"id": "right", "work": {}, "needs": []}],
}
Work = Callable[[StepCall], Awaitable[JsonValue]]


class Recorder:
    """A step type with effects: it notes every run, then does what the test asks of the step."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, str, int]] = []
        self.works: dict[str, Work] = {}
        self.aborted: list[str] = []

    async def run(self, call: StepCall) -> JsonValue:
        self.runs.append((call.execution_id, call.step_id, call.attempt))
        work = self.works.get(call.step_id)
        try:
            return {"ran": call.step_id} if work is None else await work(call)
        except asyncio.CancelledError:
            self.aborted.append(call.execution_id)
            raise

    def count(self, step_id: str) -> Counter[str]:
        """Runs of a step, by execution."""
        return Counter(execution_id for execution_id, step, _ in self.runs if step == step_id)


class Mortal:
    """A store as a process has it: once that is dead, no call leaves it any more."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self.is_dead = False
        self.answers_lost = 0  # commits to come that are applied without an answer

    def __getattr__(self, name: str) -> Any:
        if self.is_dead:
            raise StoreUnavailableError("its process is dead")
        return getattr(self._store, name)

    async def commit(self, commit: Commit) -> CommitAnswer:
        if self.is_dead:
            raise StoreUnavailableError("its process is dead")
        answer = await self._store.commit(commit)
        if self.answers_lost and isinstance(answer, Committed):
            self.answers_lost -= 1
            raise StoreUnavailableError("the answer was lost")
        return answer


class HardOfHearing:
    """Bells of which some notices are lost."""

    def __init__(self, bells: Bells, hears: Callable[[Notice], bool]) -> None:
        self._bells = bells
        self._hears = hears

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        async with self._bells.listen() as notices:
            yield (notice async for notice in notices if self._hears(notice))


class Bench(Harness):
    """The harness on the product's own connections, with workers that can die."""

    def __post_init__(self) -> None:
        self.recorder = Recorder()
        self.step_types = {"work": StepType(check=lambda _: (), run=self.recorder.run)}
        super().__post_init__()
        self.surface_url = self.url
        self.opened: list[RedisConnections] = []
        self.client = raw_client(self.url)
        self.stores: dict[str, Mortal] = {}

    def open(self, url: str) -> RedisConnections:
        settings = Settings(
            redis_url=SecretStr(url), partitions=PARTITIONS, backlog_max=self.backlog_max
        )
        self.opened.append(connect(settings, self.clock))
        return self.opened[-1]

    def connect(self) -> tuple[RedisNodes, RedisStore]:
        opened = self.open(self.surface_url)
        self.calls.append(opened.calls)
        return opened.nodes, opened.store

    async def start_worker(
        self,
        name: str,
        *,
        url: str | None = None,
        hears: Callable[[Notice], bool] | None = None,
        limits: WorkerLimits = LIMITS,
    ) -> tuple[Executor, Mortal]:
        opened = self.open(url or self.url)
        store = Mortal(opened.store)
        runtime = Runtime(store, self.step_types, self.expressions, self.clock, self.entropy)
        bells: Bells = RedisBells(opened.nodes, worker_channels(name, PARTITIONS), self.clock)
        if hears is not None:
            bells = HardOfHearing(bells, hears)
        executor = Executor(name, runtime, bells, self.catalog, limits)
        self.executors[name] = (executor, asyncio.create_task(executor.run()))
        self.stores[name] = store
        async with asyncio.timeout(WITHIN_S):
            while not executor.beat_at_s:
                await asyncio.sleep(0.005)
        return executor, store

    async def kill(self, name: str) -> None:
        """End a worker as kill -9 does: nothing is handed over."""
        self.stores[name].is_dead = True
        await self.stop_executor(name)

    def set_retry(self, workflow_id: str, step_id: str, policy: RetryPolicy) -> None:
        """Give a step a policy with delays that a test can wait for."""
        workflow: Workflow = self.catalog.workflows[workflow_id]
        steps = tuple(
            replace(step, retry=policy) if step.id == step_id else step for step in workflow.steps
        )
        workflows = {**self.catalog.workflows, workflow_id: replace(workflow, steps=steps)}
        self.catalog.workflows = workflows

    async def journal(self, execution_id: str) -> list[Entry]:
        return entries_of_stored(await self.opened[0].store.read(execution_id, 0, 100_000))

    async def check(self, *execution_ids: str) -> None:
        """Judge the journals of executions that have ended."""
        for execution_id in execution_ids:
            assert journal_problems(await self.journal(execution_id)) == [], execution_id

    async def owner(self, execution_id: str) -> str:
        """The worker that the store has as the owner, or nothing."""
        key = f"ip:{{{int(execution_id[4:6], 16)}}}:s:{execution_id}"
        token = await self.client.hget(key, "owner")
        return token.decode().rpartition("/")[0]

    async def close(self) -> None:
        await super().close()
        for opened in self.opened:
            await opened.close()
        await self.client.aclose()


@pytest.fixture
async def bench(store_url: str) -> AsyncIterator[Bench]:
    bench = Bench(store_url, definitions=[THREE, PAIR])
    bench.open(store_url)
    await bench.client.flushall()
    yield bench
    await bench.close()


@pytest.fixture
async def surface(bench: Bench) -> AsyncIterator[tuple[Executions, Feeds]]:
    async with bench.surface() as opened:
        yield opened


@pytest.fixture
def executions(surface: tuple[Executions, Feeds]) -> Executions:
    return surface[0]


def wish(workflow_id: str = "three", **changes: Any) -> Submission:
    changes.setdefault(
        "execution_id", journal.execution_id(random.randrange(PARTITIONS), uuid4().hex)
    )
    return Submission(workspace=WORKSPACE, workflow_id=workflow_id, input={"text": "é"}, **changes)


async def start_many(executions: Executions, count: int, **changes: Any) -> list[str]:
    started = await asyncio.gather(*(executions.start(wish(**changes)) for _ in range(count)))
    return [one.execution.id for one in started]


async def ended(executions: Executions, *execution_ids: str) -> list[Execution]:
    async def one(execution_id: str) -> Execution:
        async with executions.follow(WORKSPACE, execution_id) as feed:
            return await feed.ended()

    async with asyncio.timeout(WITHIN_S):
        return list(await asyncio.gather(*map(one, execution_ids)))


async def until(is_true: Callable[[], object], within_s: float = WITHIN_S) -> float:
    """Wait for a condition; the seconds it took."""
    started_s = time.monotonic()
    async with asyncio.timeout(within_s):
        while not is_true():
            await asyncio.sleep(0.002)
    return time.monotonic() - started_s


async def until_status(executions: Executions, execution_id: str, status: Status) -> None:
    async with asyncio.timeout(WITHIN_S):
        while (await executions.load(WORKSPACE, execution_id)).status is not status:
            await asyncio.sleep(0.002)


def show(text: str) -> None:
    """A figure, for whoever runs this with `-s`."""
    print(f"\n  {text}")


def held(gate: asyncio.Event) -> Work:
    async def work(call: StepCall) -> JsonValue:
        call.emit(call.step_id, ())
        await gate.wait()
        return call.step_id

    return work


def failing(times: int, *, is_retryable: bool = True) -> Work:
    async def work(call: StepCall) -> JsonValue:
        if call.attempt <= times:
            raise StepFailedError(f"no {call.attempt}", is_retryable)
        return call.step_id

    return work


async def test_a_burst_over_two_executors_ends_once_each(
    bench: Bench, executions: Executions
) -> None:
    await bench.start_worker("w1")
    await bench.start_worker("w2")
    started_s = time.monotonic()
    ids = await start_many(executions, 200)
    results = await ended(executions, *ids)
    took_s = time.monotonic() - started_s
    assert {result.status for result in results} == {Status.COMPLETED}
    assert Counter(bench.recorder.runs) == {
        (execution_id, step, 1): 1 for execution_id in ids for step in ("one", "two", "last")
    }
    await bench.check(*ids)
    show(f"200 executions of 3 steps on 2 executors: {took_s:.2f} s, each ended once")


async def test_the_other_takes_over_from_one_that_died(
    bench: Bench, executions: Executions
) -> None:
    gate = asyncio.Event()
    bench.recorder.works["two"] = held(gate)
    await bench.start_worker("w1")
    await bench.start_worker("w2")
    ids = await start_many(executions, 20)
    await until(lambda: len(bench.recorder.count("two")) == len(ids))
    victims = {one for one in ids if await bench.owner(one) == "w1"}
    assert 0 < len(victims) < len(ids)
    await bench.kill("w1")
    took_s = await until(lambda: all(bench.recorder.count("two")[one] == 2 for one in victims))
    gate.set()
    results = await ended(executions, *ids)
    assert {result.status for result in results} == {Status.COMPLETED}
    assert {step.attempt for result in results for step in result.steps.values()} == {1}
    assert {result.attempt for result in results} == {1}
    assert {result.id for result in results if result.steps["two"].losses} == victims
    assert bench.recorder.count("one") == dict.fromkeys(ids, 1)
    assert bench.recorder.count("two") == {one: 1 + (one in victims) for one in ids}
    assert bench.recorder.count("last") == dict.fromkeys(ids, 1)
    await bench.check(*ids)
    show(f"{len(victims)} executions taken over {took_s:.2f} s after death, lease {LEASE_MS} ms")


async def test_a_clean_stop_hands_over_at_once(bench: Bench, executions: Executions) -> None:
    gate = asyncio.Event()
    bench.recorder.works["two"] = held(gate)
    await bench.start_worker("w1")
    [execution_id] = await start_many(executions, 1)
    await until(lambda: bench.recorder.count("two")[execution_id])
    await bench.start_worker("w2")
    await bench.stop_executor("w1")
    assert await until(lambda: bench.recorder.count("two")[execution_id] == 2) < LEASE_MS / 2000
    gate.set()
    [result] = await ended(executions, execution_id)
    assert (result.status, result.steps["two"].attempt) == (Status.COMPLETED, 1)
    await bench.check(execution_id)


@pytest.mark.parametrize("is_over", [False, True], ids=["new run under way", "execution ended"])
async def test_a_stale_owner_is_refused_and_stops(
    bench: Bench, executions: Executions, is_over: bool
) -> None:
    old, new = asyncio.Event(), asyncio.Event()
    gates = iter([old, new])

    async def work(call: StepCall) -> JsonValue:
        mine = next(gates)
        await mine.wait()
        return "old" if mine is old else "new"

    bench.recorder.works["two"] = work
    paused, _ = await bench.start_worker("w1")
    [execution_id] = await start_many(executions, 1)
    await until(lambda: bench.recorder.count("two")[execution_id])
    survivor, _ = await bench.start_worker("w2")
    assert await survivor.take_over("w1") == 1
    await until(lambda: bench.recorder.count("two")[execution_id] == 2)
    if is_over:
        new.set()
        await ended(executions, execution_id)
    old.set()
    await until(lambda: paused.owned_count == 0)
    new.set()
    [result] = await ended(executions, execution_id)
    assert result.steps["two"].output == "new"
    assert result.steps["two"].attempt == 1
    assert bench.recorder.count("last")[execution_id] == 1
    await bench.check(execution_id)


async def test_what_was_pushed_and_not_heard_is_found_by_the_heartbeat(
    bench: Bench, executions: Executions
) -> None:
    await bench.start_worker("w1", hears=lambda n: not isinstance(n, Assigned | ReadyRang))
    started_s = time.monotonic()
    ids = await start_many(executions, 20)
    await ended(executions, *ids)
    took_s = time.monotonic() - started_s
    assert Counter(bench.recorder.runs).most_common(1)[0][1] == 1
    await bench.check(*ids)
    show(f"20 lost pushes found and done in {took_s:.2f} s, heartbeat {BEAT_MS} ms")


async def test_a_cancel_that_was_not_heard_is_found(bench: Bench, executions: Executions) -> None:
    bench.recorder.works["two"] = held(asyncio.Event())
    await bench.start_worker("w1", hears=lambda notice: isinstance(notice, Assigned))
    [execution_id] = await start_many(executions, 1)
    await until(lambda: bench.recorder.count("two")[execution_id])
    await asyncio.sleep(0.1)  # its chunk is in, so nothing but the cancel can wake the driver
    started_s = time.monotonic()
    await executions.cancel(WORKSPACE, execution_id, "enough")
    [result] = await ended(executions, execution_id)
    took_s = time.monotonic() - started_s
    assert result.status is Status.CANCELLED
    assert took_s < 2
    await bench.check(execution_id)
    show(f"a cancel whose bell was lost ended the execution after {took_s:.2f} s")


async def test_a_commit_whose_answer_was_lost_is_not_repeated(
    bench: Bench, executions: Executions
) -> None:
    async def work(call: StepCall) -> JsonValue:
        for number in range(5):
            call.emit(f"{number} ", ())
            await asyncio.sleep(0.02)
        return "0 1 2 3 4"

    bench.recorder.works["two"] = work
    _, store = await bench.start_worker("w1")
    store.answers_lost = 4
    [execution_id] = await start_many(executions, 1)
    [result] = await ended(executions, execution_id)
    assert store.answers_lost == 0
    assert result.status is Status.COMPLETED
    await bench.check(execution_id)


async def test_a_parked_retry_has_no_owner_and_wakes_on_time(
    bench: Bench, executions: Executions
) -> None:
    bench.recorder.works["two"] = failing(1)
    bench.set_retry("three", "two", RetryPolicy(1, Backoff.FIXED, initial_delay_ms=1_000))
    await bench.start_worker("w1")
    await bench.start_worker("w2")
    [execution_id] = await start_many(executions, 1)
    await until_status(executions, execution_id, Status.WAITING)
    assert await bench.owner(execution_id) == ""
    [result] = await ended(executions, execution_id)
    journal = await bench.journal(execution_id)
    [wake_at_ms] = [entry.data["wake_at_ms"] for entry in journal if entry.kind == "step.retrying"]
    starts = [e.data["at_ms"] for e in journal if e.data.get("step_id") == "two"]
    late_ms = starts[2] - wake_at_ms  # started, retrying, started, …
    assert result.steps["two"].attempt == 2
    assert 0 <= late_ms < 2_000  # told by a timer; a missed one would wait for the deadline
    await bench.check(execution_id)
    show(f"a retry due after 1000 ms began {late_ms} ms late")


async def test_step_retries_count_inside_each_try_of_the_execution(
    bench: Bench, executions: Executions
) -> None:
    bench.recorder.works["two"] = failing(100)
    soon = RetryPolicy(2, Backoff.FIXED, initial_delay_ms=20)
    bench.set_retry("three", "two", soon)
    await bench.start_worker("w1")
    [execution_id] = await start_many(executions, 1, retry=replace(soon, attempts=1))
    [result] = await ended(executions, execution_id)
    assert (result.status, result.error_code, result.attempt) == (Status.FAILED, "STEP_FAILED", 2)
    runs = [(step, attempt) for _, step, attempt in bench.recorder.runs]
    assert runs == [("one", 1), *(("two", attempt) for attempt in range(1, 7))]
    await bench.check(execution_id)


async def test_a_retry_keeps_what_is_done(bench: Bench, executions: Executions) -> None:
    bench.recorder.works["last"] = failing(2)
    await bench.start_worker("w1")
    policy = RetryPolicy(2, Backoff.FIXED, initial_delay_ms=20)
    [execution_id] = await start_many(executions, 1, retry=policy)
    [result] = await ended(executions, execution_id)
    assert (result.status, result.attempt) == (Status.COMPLETED, 3)
    runs = [(step, attempt) for _, step, attempt in bench.recorder.runs]
    assert runs == [("one", 1), ("two", 1), ("last", 1), ("last", 2), ("last", 3)]
    await bench.check(execution_id)


async def test_an_error_that_is_not_retryable_ends_it(bench: Bench, executions: Executions) -> None:
    bench.recorder.works["two"] = failing(1, is_retryable=False)
    policy = RetryPolicy(3, Backoff.FIXED, initial_delay_ms=20)
    bench.set_retry("three", "two", policy)
    await bench.start_worker("w1")
    [execution_id] = await start_many(executions, 1, retry=policy)
    [result] = await ended(executions, execution_id)
    assert (result.status, result.error_code) == (Status.FAILED, "STEP_FAILED")
    assert bench.recorder.count("two")[execution_id] == 1
    await bench.check(execution_id)


@pytest.mark.parametrize("is_parked", [False, True], ids=["running", "parked"])
async def test_the_deadline_ends_it(bench: Bench, executions: Executions, is_parked: bool) -> None:
    bench.recorder.works["two"] = failing(1) if is_parked else held(asyncio.Event())
    bench.set_retry("three", "two", RetryPolicy(1, Backoff.FIXED, 60_000, 60_000))
    await bench.start_worker("w1")
    [execution_id] = await start_many(executions, 1, timeout_ms=400)
    [result] = await ended(executions, execution_id)
    assert (result.status, result.error_code) == (Status.FAILED, "TIMEOUT")
    assert result.completed_at_ms is not None
    assert 400 <= result.completed_at_ms - result.created.at_ms < 700
    assert bench.recorder.aborted == ([] if is_parked else [execution_id])
    await bench.check(execution_id)


@pytest.mark.parametrize("state", ["running", "parked", "ready"])
async def test_cancel_ends_it(bench: Bench, executions: Executions, state: str) -> None:
    bench.recorder.works["two"] = failing(1) if state == "parked" else held(asyncio.Event())
    bench.set_retry("three", "two", RetryPolicy(1, Backoff.FIXED, 60_000, 60_000))
    if state != "ready":
        await bench.start_worker("w1")
    [execution_id] = await start_many(executions, 1)
    if state == "parked":
        await until_status(executions, execution_id, Status.WAITING)
    elif state == "running":
        await until(lambda: bench.recorder.count("two")[execution_id])
    started_s = time.monotonic()
    await executions.cancel(WORKSPACE, execution_id, "enough")
    await executions.cancel(WORKSPACE, execution_id, "enough, I said")
    if state == "ready":
        await bench.start_worker("w1")
    [result] = await ended(executions, execution_id)
    took_s = time.monotonic() - started_s
    assert (result.status, result.error, result.error_code) == (
        Status.CANCELLED,
        "enough",
        "CANCELLED",
    )
    assert took_s < 1
    assert bench.recorder.count("two")[execution_id] == (state != "ready")
    assert bench.recorder.aborted == ([execution_id] if state == "running" else [])
    with pytest.raises(AlreadyTerminalError):
        await executions.cancel(WORKSPACE, execution_id, "again")
    await bench.check(execution_id)
    show(f"cancel while {state}: ended after {1000 * took_s:.0f} ms")


async def test_a_full_backlog_refuses_and_loses_nothing(bench: Bench) -> None:
    bench.backlog_max = 10
    async with bench.surface() as (executions, _):
        answers = await asyncio.gather(
            *(executions.start(wish()) for _ in range(200)), return_exceptions=True
        )
        ids = [one.execution.id for one in answers if isinstance(one, Started)]
        refused = [one for one in answers if isinstance(one, OverloadedError)]
        assert Counter(one[4:6] for one in ids) == {f"{p:02x}": 10 for p in range(PARTITIONS)}
        assert len(ids) + len(refused) == 200
        keys = [key async for key in bench.client.scan_iter("ip:*:s:*", count=1000)]
        assert len(keys) == len(ids)
        await bench.start_worker(
            "w1", limits=replace(LIMITS, capacity=8)
        )  # two a partition: the rest comes by and by
        results = await ended(executions, *ids)
        assert {result.status for result in results} == {Status.COMPLETED}
        await ended(executions, *await start_many(executions, 1))
        await bench.check(*ids)
    assert Counter(bench.recorder.runs).most_common(1)[0][1] == 1
    show(f"backlog of 10 in 4 partitions: {len(ids)} accepted and done, {len(refused)} refused")


async def test_chunks_are_in_order_and_whole_under_concurrency(
    bench: Bench, executions: Executions
) -> None:
    words = [f"{number} " for number in range(150)]

    async def work(call: StepCall) -> JsonValue:
        for number, word in enumerate(words):
            call.emit(word, (number,))
            if random.random() < 0.2:
                await asyncio.sleep(0.0005)
        return "".join(words)

    bench.recorder.works.update(left=work, right=work)
    await bench.start_worker("w1")
    await bench.start_worker("w2")
    ids = await start_many(executions, 10, workflow_id="pair")
    await ended(executions, *ids)
    chunk_count = 0
    for execution_id in ids:
        journal = await bench.journal(execution_id)
        assert journal_problems(journal) == []
        for step in ("left", "right"):
            chunks = [e for e in journal if e.kind == "chunk" and e.data["step_id"] == step]
            assert "".join(chunk.data["text"] for chunk in chunks) == "".join(words)
            numbers = [number for chunk in chunks for number in chunk.data["token_ids"]]
            assert numbers == list(range(150))
            chunk_count += len(chunks)
    show(f"{20 * len(words)} deltas of 20 steps lie in {chunk_count} chunks, in order and whole")


async def test_a_key_gives_one_execution(bench: Bench, executions: Executions) -> None:
    await bench.start_worker("w1")
    same = wish(
        execution_id=executions.new_id(WORKSPACE, "/v1/execute", "k"),
        idempotency_key="k",
        request_hash="h",
    )
    started = await asyncio.gather(*(executions.start(same) for _ in range(10)))
    [execution_id] = {one.execution.id for one in started}
    assert [one.is_new for one in started].count(True) == 1
    await ended(executions, execution_id)
    late = await executions.start(same)
    assert (late.is_new, late.execution.status) == (False, Status.COMPLETED)
    with pytest.raises(IdempotencyConflictError):
        await executions.start(replace(same, request_hash="other"))
    elsewhere = await executions.start(
        replace(
            same,
            workspace="other",
            execution_id=executions.new_id("other", "/v1/execute", "k"),
        )
    )
    assert elsewhere.execution.id != execution_id
    with pytest.raises(UnknownExecutionError):
        await executions.load("other", execution_id)
    assert bench.recorder.count("one")[execution_id] == 1


@ONE_SERVER  # the proxy stands before one; a cluster's nodes name their own addresses
async def test_cut_connections_lose_and_repeat_nothing(bench: Bench) -> None:
    """Everything but the tests' own reads goes through a network that breaks all the time."""

    async def work(call: StepCall) -> JsonValue:
        for word in ("a ", "b ", "c"):
            call.emit(word, ())
            await asyncio.sleep(0.01)
        return "a b c"

    bench.recorder.works.update(one=work, two=work)
    async with TcpProxy.before(bench.url) as proxy, asyncio.TaskGroup() as group:
        bench.surface_url = proxy.url(bench.url)
        patient = WorkerLimits()  # as shipped: short outages are no deaths
        await bench.start_worker("w1", url=bench.surface_url, limits=patient)
        await bench.start_worker("w2", url=bench.surface_url, limits=patient)
        async with bench.surface() as (executions, _):
            cutting = group.create_task(cut_at_random(proxy))
            ids = []
            for _ in range(12):
                ids += await start_many(executions, 5)
                await asyncio.sleep(0.1)
            results = await ended(executions, *ids)
            cutting.cancel()
            proxy.delay_s = 0.0
        for name in ("w1", "w2"):
            await bench.stop_executor(name)
    assert {result.status for result in results} == {Status.COMPLETED}
    assert len(set(ids)) == 60
    await bench.check(*ids)
    again = 0
    for result in results:
        for step_id, step in result.steps.items():
            runs = bench.recorder.runs.count((result.id, step_id, 1))
            # Only what was taken over in the middle may run again, never what was recorded.
            assert 1 <= runs <= 1 + step.losses
            again += runs - 1
    assert proxy.cut_count > 20
    show(f"60 executions over a network cut {proxy.cut_count} times: all ended, {again} re-runs")


async def cut_at_random(proxy: TcpProxy) -> None:
    while True:
        await asyncio.sleep(random.uniform(0.02, 0.15))
        proxy.delay_s = random.choice([0.0, 0.0, 0.01])
        proxy.cut()


async def test_readers_that_are_cut_and_resume_see_each_event_once(
    bench: Bench, surface: tuple[Executions, Feeds]
) -> None:
    executions, feeds = surface

    async def work(call: StepCall) -> JsonValue:
        for number in range(200):
            call.emit(f"{number} ", ())
            await asyncio.sleep(0.003)
        return None

    bench.recorder.works.update(one=work, two=work)
    await bench.start_worker("w1")
    [execution_id] = await start_many(executions, 1)
    cuts = 0

    async def read() -> list[Entry]:
        nonlocal cuts
        seen: list[Entry] = []
        cursor = 0
        async with AsyncExitStack() as stack:
            feed = await stack.enter_async_context(executions.follow(WORKSPACE, execution_id))
            while batch := await feeds.next_frames(feed, cursor):
                shown = [(seq, frame) for seq, frame in batch if frame is not None]
                seen += [Entry(seq, kind_of(frame)) for seq, frame in shown]
                cursor = batch[-1][0]
                if random.random() < 0.05:
                    cuts += 1
                    await stack.aclose()
                    await asyncio.sleep(random.uniform(0, 0.1))
                    feed = await stack.enter_async_context(
                        executions.follow(WORKSPACE, execution_id)
                    )
        return seen

    async with asyncio.timeout(WITHIN_S):
        views = await asyncio.gather(*(read() for _ in range(50)))
    journal = await bench.journal(execution_id)
    counts = [loss_and_repetition(view, journal) for view in views]
    show(
        f"50 readers of {counts[0].expected} events each, cut {cuts} times: "
        f"{sum(c.lost for c in counts)} lost, {sum(c.repeated for c in counts)} repeated"
    )
    assert all(view_problems(view, journal) == [] for view in views)
    assert cuts > 100


def kind_of(frame: bytes) -> str:
    return next(line[7:] for line in frame.decode().splitlines() if line.startswith("event: "))

"""Flow control on a real store: who may start, who waits, and that no place is ever lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serve_app.core.errors import InvalidInputError, RateLimitExceededError, StepFailedError
from serve_app.core.execution import Execution, Status
from serve_app.core.inference import JsonValue
from serve_app.ports import StepCall, StepType
from serve_app.services.executions import Executions, RetryWish, Started, Submission
from serve_app.services.feeds import Feeds
from tests.support.harness import Harness
from tests.support.valkey_cluster import flush

WITHIN_S = 20.0
WORKSPACE = "default"
HELD = [{"id": "held", "hold": {}}]
DEFINITIONS: list[dict[str, object]] = [
    {"id": "pair", "concurrency": {"limit": 2}, "steps": HELD},
    {"id": "each", "concurrency": {"limit": 1, "key": "input.user"}, "steps": HELD},
    {"id": "single", "concurrency": {"limit": 1, "onLimit": "reject"}, "steps": HELD},
    {"id": "cached", "cache": {"ttl": "1h"}, "concurrency": {"limit": 1}, "steps": HELD},
    {"id": "rated", "rateLimit": {"requests": 3, "window": "1h"}, "steps": HELD},
    {"id": "slow", "rateLimit": {"requests": 1, "window": "400ms"}, "steps": HELD},
]


class Holder:
    """A step that runs until the test lets it go; it notes how many ran at once."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.most_inside = 0
        self.run_count = 0
        self.changed = asyncio.Condition()
        self.let_go: set[str] = set()
        self.is_open = False

    async def run(self, call: StepCall) -> JsonValue:
        async with self.changed:
            self.run_count += 1
            self.inside.append(call.execution_id)
            self.most_inside = max(self.most_inside, len(self.inside))
            self.changed.notify_all()
            try:
                await self.changed.wait_for(
                    lambda: self.is_open or call.execution_id in self.let_go
                )
            finally:
                self.inside.remove(call.execution_id)
                self.changed.notify_all()
        if isinstance(call.input, dict) and call.input.get("fail"):
            raise StepFailedError("as asked", False)
        return {"by": call.execution_id}

    async def until_inside(self, count: int) -> None:
        async with asyncio.timeout(WITHIN_S), self.changed:
            await self.changed.wait_for(lambda: len(self.inside) == count)

    async def release(self, *execution_ids: str) -> None:
        """Let some go, or all there are and will be."""
        async with self.changed:
            self.let_go.update(execution_ids)
            self.is_open = self.is_open or not execution_ids
            self.changed.notify_all()


class Stage:
    """Two executors, one ingress, and the step that holds."""

    def __init__(self, harness: Harness, holder: Holder, surface: tuple[Executions, Feeds]) -> None:
        self.harness = harness
        self.holder = holder
        self.executions, self.feeds = surface

    async def start(
        self, workflow_id: str, given: JsonValue = None, key: str | None = None, **wish: object
    ) -> Started:
        submission = Submission(
            execution_id=self.executions.new_id(WORKSPACE, "test", key),
            workspace=WORKSPACE,
            workflow_id=workflow_id,
            input={} if given is None else given,
            idempotency_key=key,
            request_hash=key,
            **wish,  # type: ignore[arg-type]
        )
        return await self.executions.start(submission)

    async def end(self, started: Started) -> Execution:
        async with (
            asyncio.timeout(WITHIN_S),
            self.executions.follow(WORKSPACE, started.execution.id) as feed,
        ):
            return await feed.ended()


@asynccontextmanager
async def staged(url: str) -> AsyncIterator[Stage]:
    await flush(url)
    holder = Holder()
    step_types = {"hold": StepType(check=lambda _settings: (), run=holder.run)}
    harness = Harness(url, step_types=step_types, definitions=DEFINITIONS)
    await harness.start_executor("one")
    await harness.start_executor("two")
    try:
        async with harness.surface() as surface:
            yield Stage(harness, holder, surface)
    finally:
        await harness.close()


@pytest.fixture
async def stage(store_url: str) -> AsyncIterator[Stage]:
    async with staged(store_url) as ready:
        yield ready


async def test_a_limit_holds_and_everyone_in_line_gets_through(stage: Stage) -> None:
    started = [await stage.start("pair") for _ in range(6)]
    await stage.holder.until_inside(2)
    first = list(stage.holder.inside)
    await stage.holder.release(first[0])
    await stage.holder.until_inside(2)
    await stage.holder.release()
    ended = [await stage.end(one) for one in started]
    assert {one.status for one in ended} == {Status.COMPLETED}
    assert stage.holder.most_inside == 2
    assert stage.holder.run_count == 6


async def test_a_caller_that_waits_for_its_answer_is_refused_at_the_limit(stage: Stage) -> None:
    await stage.start("pair")
    await stage.start("pair")
    await stage.holder.until_inside(2)
    with pytest.raises(RateLimitExceededError, match="2 executions") as refusal:
        await stage.start("pair", mode="sync")
    assert refusal.value.standing is not None
    assert refusal.value.standing.reset_s >= 1
    await stage.holder.release()


async def test_a_repeat_is_not_refused_for_its_own_first_call(stage: Stage) -> None:
    first = await stage.start("single", key="k1")
    await stage.holder.until_inside(1)
    again = await stage.start("single", key="k1", mode="sync")
    assert (again.execution.id, again.is_new) == (first.execution.id, False)
    await stage.holder.release()


async def test_rejecting_limits_queue_nobody(stage: Stage) -> None:
    await stage.start("single")
    await stage.holder.until_inside(1)
    with pytest.raises(RateLimitExceededError):
        await stage.start("single")
    await stage.holder.release()


async def test_of_two_in_the_same_moment_one_is_refused(stage: Stage) -> None:
    calls = (stage.start("single", mode=mode) for mode in ("sync", "async", "sync"))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    accepted = [one for one in answers if isinstance(one, Started)]
    refused = [one for one in answers if isinstance(one, RateLimitExceededError)]
    assert len(accepted) + len(refused) == 3
    await stage.holder.until_inside(1)
    for one in accepted:
        if one.execution.id not in stage.holder.inside:  # ends while the place is still taken
            ended = await stage.end(one)
            assert (ended.status, ended.error_code) == (Status.FAILED, "RATE_LIMIT_EXCEEDED")
    await stage.holder.release()
    assert stage.holder.run_count == 1


async def test_keys_have_limits_of_their_own(stage: Stage) -> None:
    users = ("ann", "ben", "ann", "ben", "ann")
    started = [await stage.start("each", {"user": user}) for user in users]
    await stage.holder.until_inside(2)
    assert set(stage.holder.inside) == {started[0].execution.id, started[1].execution.id}
    await stage.holder.release()
    for one in started:
        assert (await stage.end(one)).status is Status.COMPLETED


async def test_a_key_without_a_value_is_the_callers_mistake(stage: Stage) -> None:
    with pytest.raises(InvalidInputError, match=r"concurrency\.key"):
        await stage.start("each", {})


async def test_a_cancelled_execution_leaves_the_line_and_its_place(stage: Stage) -> None:
    inside = [await stage.start("pair") for _ in range(2)]
    await stage.holder.until_inside(2)
    waiting, last = await stage.start("pair"), await stage.start("pair")
    await stage.executions.cancel(WORKSPACE, waiting.execution.id, "not needed")
    assert (await stage.end(waiting)).status is Status.CANCELLED
    await stage.executions.cancel(WORKSPACE, inside[0].execution.id, "not needed")
    assert (await stage.end(inside[0])).status is Status.CANCELLED
    await stage.holder.release()
    assert (await stage.end(last)).status is Status.COMPLETED
    assert waiting.execution.id not in stage.holder.let_go


async def test_the_deadline_runs_in_the_line(stage: Stage) -> None:
    for _ in range(2):
        await stage.start("pair")
    await stage.holder.until_inside(2)
    late = await stage.end(await stage.start("pair", timeout_ms=300))
    assert (late.status, late.error_code) == (Status.FAILED, "TIMEOUT")
    await stage.holder.release()


async def test_a_lost_worker_loses_no_place(stage: Stage) -> None:
    started = [await stage.start("pair") for _ in range(4)]
    await stage.holder.until_inside(2)
    for name in ("one", "two"):
        await stage.harness.stop_executor(name)
    await stage.harness.start_executor("three")
    await stage.holder.release()
    for one in started:
        assert (await stage.end(one)).status is Status.COMPLETED
    assert stage.holder.most_inside == 2


async def test_the_same_call_twice_at_once_runs_once(stage: Stage) -> None:
    first = await stage.start("cached", {"a": 1, "b": 2})
    await stage.holder.until_inside(1)
    others = [await stage.start("cached", {"b": 2, "a": 1}, mode="sync") for _ in range(3)]
    await stage.holder.release()
    result = await stage.end(first)
    assert (result.status, result.verdict) == (Status.COMPLETED, "passed")
    for one in (*others, await stage.start("cached", {"a": 1, "b": 2}, mode="sync")):
        shared = await stage.end(one)
        assert (shared.status, shared.verdict) == (Status.COMPLETED, "hit")
        assert shared.data == result.data
        assert not shared.steps
    assert stage.holder.run_count == 1
    other = await stage.end(await stage.start("cached", {"a": 1, "b": 3}))
    assert other.data == {"by": other.id}


async def test_a_failed_result_is_not_shared(stage: Stage) -> None:
    given = {"fail": True}
    first, second = await stage.start("cached", given), await stage.start("cached", given)
    await stage.holder.release()
    for one in (first, second):
        assert (await stage.end(one)).status is Status.FAILED
    assert stage.holder.run_count == 2


async def test_a_retry_runs_again_whatever_is_cached(stage: Stage) -> None:
    await stage.holder.release()
    first = await stage.end(await stage.start("cached", {"x": 1}))
    again = await stage.end(await stage.executions.retry(WORKSPACE, first.id, RetryWish()))
    assert again.data == {"by": again.id}
    assert stage.holder.run_count == 2


async def test_a_rate_refuses_who_waits(stage: Stage) -> None:
    await stage.holder.release()
    for _ in range(3):
        await stage.end(await stage.start("rated", mode="sync"))
    with pytest.raises(RateLimitExceededError, match="3 times in 3600000 ms") as refusal:
        await stage.start("rated", mode="sync")
    assert refusal.value.standing is not None
    assert 0 < refusal.value.standing.reset_s <= 1200  # one place in each third of the window
    with pytest.raises(RateLimitExceededError):
        await stage.start("rated")  # its turn is further ahead than the harness allows


async def test_a_rate_delays_who_does_not_wait(stage: Stage) -> None:
    await stage.holder.release()
    first = await stage.end(await stage.start("slow"))
    second = await stage.end(await stage.start("slow"))
    assert (first.status, second.status) == (Status.COMPLETED, Status.COMPLETED)
    assert second.started_at_ms is not None
    assert second.started_at_ms >= first.created.at_ms + 400 - 5  # a timer may fire a bit early

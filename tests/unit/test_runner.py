"""The driver of one execution against a store that conflicts, fences, and goes away."""

import asyncio
from contextlib import suppress

import pytest

from serve_app.core.errors import (
    ConnectionFailedError,
    InvalidPromptError,
    OverloadedError,
    StepFailedError,
    StoreUnavailableError,
)
from serve_app.core.execution import (
    CancelRequested,
    ChunkEmitted,
    Event,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionFailed,
    ExecutionParked,
    ExecutionStarted,
    Status,
    StepCompleted,
    StepFailed,
    StepRetrying,
    StepStarted,
    StepStatus,
)
from serve_app.core.inference import JsonValue, Usage
from serve_app.core.journal import Commit
from serve_app.ports import StepCall
from serve_app.services import planner
from serve_app.services.planner import BROKEN
from serve_app.services.runner import ABORT_WAIT_S, STORE_RETRY_S
from tests.support.rig import TOKEN, Rig, Run, now_ms
from tests.support.virtual_time import EPOCH_MS, virtual_time
from tests.support.workflows import (
    EXECUTION_ID,
    FIXED,
    a_chain,
    a_step,
    a_workflow,
)

USAGE = Usage(3, 4, 0)
GONE = StoreUnavailableError("gone")


async def forever(call: StepCall) -> JsonValue:
    await asyncio.Event().wait()
    return None


def a_rig(run: Run, **step: object) -> Rig:
    """A rig with one step, `s`."""
    return Rig(a_workflow(a_step("s", **step)), {"s": run})


async def ten(call: StepCall) -> JsonValue:
    return 10


@virtual_time
async def test_steps_run_in_order_and_see_what_came_before() -> None:
    first, second = a_step("a"), a_step("b", settings={"n": "{{ steps.a.output }}"})
    rig = Rig(a_workflow(*a_chain(first, second)), {"a": ten, "b": ten})
    ended = await rig.drive(priority=5, timeout_ms=60_000)
    assert (ended.status, ended.data) == (Status.COMPLETED, 10)
    assert [call.settings for call in rig.calls] == [{}, {"n": 10}]
    call = rig.calls[1]
    assert call.idempotency_key == f"{EXECUTION_ID}/b/1"
    assert (call.priority, call.deadline_ms) == (5, EPOCH_MS + 60_000)
    assert call.input == {"name": "Ada"}


@virtual_time
async def test_a_step_runs_only_after_its_start_is_durable() -> None:
    async def look(call: StepCall) -> JsonValue:
        return [type(event).__name__ for event in rig.events]

    rig = a_rig(look)
    assert (await rig.drive()).data == ["ExecutionStarted", "StepStarted"]


@virtual_time
async def test_pure_steps_share_one_commit_from_start_to_end() -> None:
    steps = a_chain(a_step("a", "pure", settings="{{ input.name }}"), a_step("b", "pure"))
    rig = Rig(a_workflow(*steps, output="{{ steps.a.output }}"))
    assert (await rig.drive()).data == "Ada"
    assert rig.commits() == ["create", f"{TOKEN}.1"]
    assert rig.calls == []


@pytest.mark.parametrize(
    ("error", "text"),
    [(StepFailedError("no", False), "no"), (ZeroDivisionError("secret"), BROKEN)],
)
@virtual_time
async def test_a_pure_step_that_breaks_fails_the_execution(error: Exception, text: str) -> None:
    def compute(call: StepCall) -> JsonValue:
        raise error

    ended = await Rig(a_workflow(a_step("s", "pure")), compute=compute).drive()
    assert (ended.status, ended.error) == (Status.FAILED, f"step s: {text}")


@virtual_time
async def test_a_pure_step_whose_expression_fails_is_retried_by_nobody() -> None:
    rig = Rig(a_workflow(a_step("s", "pure", settings="{{ input.nobody }}", retry=FIXED)))
    ended = await rig.drive(retry=FIXED)
    assert ended.error == "step s: no such key: nobody"
    assert StepRetrying not in rig.kinds()


@virtual_time
async def test_steps_without_needs_run_side_by_side() -> None:
    both = asyncio.Barrier(2)

    async def meet(call: StepCall) -> JsonValue:
        await both.wait()
        return call.step_id

    rig = Rig(a_workflow(a_step("a"), a_step("b")), {"a": meet, "b": meet})
    assert (await rig.drive()).data == "b"


@virtual_time
async def test_chunks_that_come_while_a_commit_is_under_way_become_one_event() -> None:
    released = asyncio.Event()

    async def wait(commit: Commit) -> None:
        await released.wait()

    async def talk(call: StepCall) -> JsonValue:
        call.emit("a", (1,))
        await asyncio.sleep(0.01)  # its commit is held by the store now
        for index, letter in enumerate("bcd"):
            call.emit(letter, (index + 2,))
            await asyncio.sleep(0.01)
        call.report_usage(USAGE)
        released.set()
        return "abcd"

    async def pass_by(commit: Commit) -> None:
        return

    rig = a_rig(talk)
    rig.store.before.extend([pass_by, wait])
    ended = await rig.drive()
    chunks = [event for event in rig.events if isinstance(event, ChunkEmitted)]
    assert [(e.text, e.token_ids) for e in chunks] == [("a", (1,)), ("bcd", (2, 3, 4))]
    assert (ended.data, ended.usage) == ("abcd", USAGE)
    assert len(rig.calls) == 1


@virtual_time
async def test_a_step_that_ends_while_a_commit_is_under_way_does_not_run_again() -> None:
    async def talk(call: StepCall) -> JsonValue:
        call.emit("a", (1,))
        await asyncio.sleep(0)
        return "a"

    async def be_slow(commit: Commit) -> None:
        await asyncio.sleep(0.01)

    rig = a_rig(talk)
    rig.store.before.extend([be_slow] * 10)
    assert (await rig.drive()).data == "a"
    assert len(rig.calls) == 1
    assert rig.text() == "a"


@virtual_time
async def test_an_empty_chunk_makes_no_event() -> None:
    async def talk(call: StepCall) -> JsonValue:
        call.emit("", ())
        return ""

    rig = a_rig(talk)
    await rig.drive()
    assert ChunkEmitted not in rig.kinds()


@pytest.mark.parametrize("commits_before", range(4))
@virtual_time
async def test_a_cancel_that_wins_the_race_for_a_commit_loses_no_fact(commits_before: int) -> None:
    async def talk(call: StepCall) -> JsonValue:
        call.emit("a", (1,))
        await asyncio.sleep(0.01)
        return "a"

    async def let_in(commit: Commit) -> None:
        return

    async def cancel_first(commit: Commit) -> None:
        rig.cancel()

    rig = a_rig(talk)
    rig.store.before.extend([*[let_in] * commits_before, cancel_first])
    ended = await rig.drive()
    if commits_before < 3:  # start, chunk, result and end: the fourth commit never comes
        assert (ended.status, ended.error) == (Status.CANCELLED, "enough")
        assert rig.text() == ("a" if commits_before else "")
    else:
        assert ended.status is Status.COMPLETED
    assert len(rig.calls) <= 1


@virtual_time
async def test_a_commit_whose_answer_was_lost_is_known_again() -> None:
    async def lose_answer(commit: Commit) -> None:
        raise GONE

    async def talk(call: StepCall) -> JsonValue:
        call.emit("a", (1,))
        await asyncio.sleep(10)
        call.emit("b", (2,))
        return "ab"

    rig = a_rig(talk)
    rig.store.after.extend([lose_answer, lose_answer, lose_answer])
    ended = await rig.drive()
    assert (ended.data, rig.text()) == ("ab", "ab")
    assert len(rig.calls) == 1
    assert rig.kinds().count(ExecutionStarted) == rig.kinds().count(ExecutionCompleted) == 1


@virtual_time
async def test_a_cancel_behind_a_commit_whose_answer_was_lost_is_heeded() -> None:
    async def lose_answer_and_cancel(commit: Commit) -> None:
        rig.cancel()
        raise GONE

    rig = a_rig(forever)
    rig.store.after.append(lose_answer_and_cancel)
    assert (await rig.drive()).status is Status.CANCELLED
    assert rig.calls == []


@pytest.mark.parametrize("error", [GONE, OverloadedError("too many calls")])
@virtual_time
async def test_an_outage_of_the_store_is_outlived_with_all_that_came_meanwhile(
    error: Exception,
) -> None:
    async def refuse(commit: Commit) -> None:
        raise error

    async def pass_by(commit: Commit) -> None:
        return

    async def talk(call: StepCall) -> JsonValue:
        for letter in "abcdef":
            call.emit(letter, (ord(letter),))
            await asyncio.sleep(0.3)
        return "done"

    rig = a_rig(talk)
    rig.store.before.extend([pass_by, *[refuse] * 4])
    assert (await rig.drive()).data == "done"
    chunks = [event for event in rig.events if isinstance(event, ChunkEmitted)]
    assert [event.text for event in chunks] == ["a", "bcdef"]
    assert now_ms() >= EPOCH_MS + 4 * STORE_RETRY_S * 1000


@virtual_time
async def test_a_driver_without_the_fence_stops_and_leaves_no_trace() -> None:
    aborted = []

    async def work(call: StepCall) -> JsonValue:
        try:
            await asyncio.sleep(1)
            call.emit("late", (1,))
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            aborted.append(call.step_id)
            raise
        return None

    rig = a_rig(work)
    driver = await rig.driver()
    driving = asyncio.create_task(driver.drive())
    await asyncio.sleep(0.5)
    rig.store.own(EXECUTION_ID, "w2/2")
    await driving
    assert aborted == ["s"]
    assert rig.kinds() == [ExecutionStarted, StepStarted]


@virtual_time
async def test_an_execution_that_is_gone_is_let_go() -> None:
    rig = a_rig(ten)
    driver = await rig.driver()
    del rig.store.states[EXECUTION_ID]
    await driver.drive()
    assert rig.calls == []


@virtual_time
async def test_a_new_owner_runs_the_same_attempt_again_and_no_finished_step() -> None:
    async def once(call: StepCall) -> JsonValue:
        call.emit("x", (1,))
        if len(rig.calls) < 3:
            await asyncio.Event().wait()
        return call.idempotency_key

    rig = Rig(a_workflow(*a_chain(a_step("a"), a_step("b"))), {"a": ten, "b": once})
    first = asyncio.create_task((await rig.driver()).drive())
    await asyncio.sleep(1)
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    await (await rig.driver("w2/2")).drive()
    assert rig.state.data == f"{EXECUTION_ID}/b/1"
    assert [call.step_id for call in rig.calls] == ["a", "b", "b"]
    assert (rig.state.attempt, rig.state.steps["b"].losses) == (1, 1)
    assert [stored.commit_id for stored in rig.store.journals[EXECUTION_ID]][-1].startswith("w2/2")


@virtual_time
async def test_a_new_owner_of_a_cancelled_execution_only_ends_it() -> None:
    rig = a_rig(forever)
    first = asyncio.create_task((await rig.driver()).drive())
    await asyncio.sleep(1)
    first.cancel()
    await asyncio.wait((first,))
    rig.cancel()
    await (await rig.driver("w2/2")).drive()
    assert rig.kinds()[2:] == [CancelRequested, StepFailed, ExecutionCancelled]
    assert len(rig.calls) == 1


@virtual_time
async def test_a_cancel_aborts_the_step_and_keeps_its_usage() -> None:
    async def talk(call: StepCall) -> JsonValue:
        call.report_usage(USAGE)
        call.emit("a", (1,))
        await asyncio.Event().wait()
        return None

    rig = a_rig(talk, retry=FIXED)
    driver = await rig.driver(retry=FIXED)
    driving = asyncio.create_task(driver.drive())
    await asyncio.sleep(3)
    rig.cancel(driver)
    await driving
    assert now_ms() == EPOCH_MS + 3000  # at once: the step ended when it was told to
    assert rig.state.status is Status.CANCELLED
    assert (rig.state.steps["s"].status, rig.state.usage) == (StepStatus.CANCELLED, USAGE)
    assert (rig.text(), rig.state.attempt) == ("a", 1)


@virtual_time
async def test_a_cancel_before_the_first_turn_of_a_step_ends_it_too() -> None:
    async def cancel_behind(commit: Commit) -> None:
        # The notice is there when the commit returns, so the abort meets a task that never ran.
        rig.cancel(driver)

    rig = a_rig(forever)
    rig.store.after.append(cancel_behind)
    driver = await rig.driver()
    await driver.drive()
    assert rig.state.status is Status.CANCELLED
    assert rig.state.steps["s"].status is StepStatus.CANCELLED
    assert rig.calls == []


@virtual_time
async def test_a_step_that_does_not_heed_its_abort_holds_up_the_end_only_so_long() -> None:
    async def stubborn(call: StepCall) -> JsonValue:
        call.report_usage(USAGE)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(100)
        await asyncio.sleep(ABORT_WAIT_S * 3)
        call.emit("too late", (9,))
        return "too late"

    rig = a_rig(stubborn)
    driver = await rig.driver()
    driving = asyncio.create_task(driver.drive())
    await asyncio.sleep(2)
    rig.cancel(driver)
    await asyncio.sleep(ABORT_WAIT_S + 0.01)
    assert rig.state.status is Status.CANCELLED
    assert (rig.state.usage, rig.state.data) == (USAGE, None)
    await driving
    assert rig.text() == ""


@virtual_time
async def test_a_deadline_ends_a_running_step() -> None:
    rig = a_rig(forever, retry=FIXED)
    ended = await rig.drive(timeout_ms=1500, retry=FIXED)
    assert (ended.status, ended.error_code) == (Status.FAILED, "TIMEOUT")
    assert ended.steps["s"].status is StepStatus.FAILED
    assert ended.attempt == 1
    assert now_ms() - EPOCH_MS in range(1500, 1510)


@virtual_time
async def test_a_step_has_a_limit_of_its_own() -> None:
    rig = a_rig(forever, timeout_ms=200)
    ended = await rig.drive()
    assert ended.error == "step s: not done within 200 ms"
    assert ended.error_code == "STEP_FAILED"


@virtual_time
async def test_a_failed_step_aborts_those_beside_it() -> None:
    async def fail(call: StepCall) -> JsonValue:
        await asyncio.sleep(1)
        raise StepFailedError("no use", False)

    rig = Rig(a_workflow(a_step("a"), a_step("b")), {"a": forever, "b": fail})
    ended = await rig.drive(retry=FIXED)
    assert (ended.error, ended.attempt) == ("step b: no use", 1)
    assert ended.steps["a"].status is StepStatus.CANCELLED


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (StepFailedError("x"), True),
        (StepFailedError("x", False), False),
        (InvalidPromptError("x"), False),
        (ZeroDivisionError("x"), True),
        (TimeoutError("the step's own"), True),
        (asyncio.CancelledError(), True),
    ],
    ids=repr,
)
@virtual_time
async def test_only_errors_that_may_pass_are_retried(
    error: BaseException, is_retried: bool
) -> None:
    async def fail_once(call: StepCall) -> JsonValue:
        if call.attempt == 1:
            raise error
        return "second"

    rig = a_rig(fail_once)
    parked = await rig.drive(retry=FIXED)
    if not is_retried:
        assert parked.status is Status.FAILED
        return
    assert (parked.status, parked.wake_at_ms) == (Status.WAITING, EPOCH_MS + 100)
    assert rig.store.owners[EXECUTION_ID] == ""
    await asyncio.sleep(0.1)
    await (await rig.driver("w2/2")).drive()
    assert (rig.state.data, rig.state.attempt) == ("second", 2)


@virtual_time
async def test_a_retry_due_while_another_step_runs_needs_no_parking() -> None:
    async def fail_once(call: StepCall) -> JsonValue:
        if call.attempt == 1:
            raise StepFailedError("x")
        return "second"

    async def slow(call: StepCall) -> JsonValue:
        await asyncio.sleep(5)
        return "slow"

    rig = Rig(a_workflow(a_step("a", retry=FIXED), a_step("b")), {"a": fail_once, "b": slow})
    assert (await rig.drive()).data == "slow"
    assert ExecutionParked not in rig.kinds()
    started = [event.at_ms for event in rig.events if isinstance(event, StepStarted)]
    assert started[-1] - EPOCH_MS in range(100, 110)


@virtual_time
async def test_a_lost_replica_is_tried_again_as_the_same_attempt() -> None:
    async def lose_twice(call: StepCall) -> JsonValue:
        call.report_usage(USAGE)
        if len(rig.calls) < 3:
            raise ConnectionFailedError("the link broke")
        return call.attempt

    rig = a_rig(lose_twice)
    parked = await rig.drive()
    assert parked.status is Status.WAITING
    await asyncio.sleep(1)
    await (await rig.driver("w1/2")).drive()
    assert (rig.state.data, rig.state.attempt) == (1, 1)
    assert rig.state.steps["s"].losses == 2
    assert rig.state.usage == USAGE + USAGE + USAGE
    assert {call.idempotency_key for call in rig.calls} == {f"{EXECUTION_ID}/s/1"}


@virtual_time
async def test_what_others_do_while_a_step_runs_is_folded_from_notices() -> None:
    rig = a_rig(forever)
    driver = await rig.driver()
    driving = asyncio.create_task(driver.drive())
    await asyncio.sleep(1)
    old = tuple(rig.store.journals[EXECUTION_ID])
    driver.notify(old)  # a sweep may bring what the driver has
    await asyncio.sleep(1)
    assert not driving.done()
    rig.cancel(driver)
    await driving
    assert rig.state.status is Status.CANCELLED


@virtual_time
async def test_a_parked_execution_waits_for_its_time_if_handed_out_early() -> None:
    async def fail_once(call: StepCall) -> JsonValue:
        if call.attempt == 1:
            raise StepFailedError("x")
        return "second"

    rig = a_rig(fail_once, retry=FIXED)
    assert (await rig.drive()).status is Status.WAITING
    await (await rig.driver("w2/2")).drive()
    assert rig.state.data == "second"
    assert now_ms() - EPOCH_MS in range(100, 110)


@virtual_time
async def test_a_bug_in_the_driver_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> tuple[Event, ...]:
        raise ZeroDivisionError

    monkeypatch.setattr(planner, "due_events", broken)
    with pytest.raises(ExceptionGroup):
        await a_rig(ten).drive()


@virtual_time
async def test_a_result_is_recorded_once_whatever_the_store_does() -> None:
    """Every commit in turn fails before or after it got in: the journal is the same."""

    async def talk(call: StepCall) -> JsonValue:
        call.emit("a", (1,))
        await asyncio.sleep(1)
        call.emit("b", (2,))
        await asyncio.sleep(1)
        return "ab"

    async def fail(commit: Commit) -> None:
        raise GONE

    async def pass_by(commit: Commit) -> None:
        return

    kinds = []
    for position in range(5):
        for hooks in ("before", "after"):
            rig = a_rig(talk)
            getattr(rig.store, hooks).extend([*[pass_by] * position, fail])
            await rig.drive()
            assert (rig.text(), len(rig.calls)) == ("ab", 1)
            kinds.append(tuple(kind for kind in rig.kinds() if kind is not ChunkEmitted))
    expected = (ExecutionStarted, StepStarted, StepCompleted, ExecutionCompleted)
    assert set(kinds) == {expected}


@virtual_time
async def test_an_execution_that_fails_ends_with_the_steps_error() -> None:
    async def fail(call: StepCall) -> JsonValue:
        raise StepFailedError("it broke", False)

    rig = a_rig(fail)
    ended = await rig.drive()
    assert isinstance(rig.events[-1], ExecutionFailed)
    assert (ended.error, ended.error_code) == ("step s: it broke", "STEP_FAILED")


@virtual_time
async def test_a_time_out_inside_a_step_is_not_the_steps_limit() -> None:
    async def give_up(call: StepCall) -> JsonValue:
        raise TimeoutError("some socket")

    ended = await a_rig(give_up, timeout_ms=60_000).drive()
    assert ended.error == f"step s: {BROKEN}"


@virtual_time
async def test_a_cancel_stops_the_steps_although_a_commit_is_not_answered() -> None:
    """The store is slow to answer a chunk's commit; the engine must not go on meanwhile."""
    is_stopped, is_back = asyncio.Event(), asyncio.Event()

    async def talk(call: StepCall) -> JsonValue:
        call.emit("some ", (1,))
        try:
            await asyncio.Event().wait()
        finally:
            call.report_usage(USAGE)
            is_stopped.set()
        return None

    async def let_in(commit: Commit) -> None:
        return

    async def wait_long(commit: Commit) -> None:
        await is_back.wait()

    rig = a_rig(talk)
    driver = await rig.driver()
    rig.store.after.extend([let_in, wait_long])  # the start is in, the chunk is not answered
    driving = asyncio.ensure_future(driver.drive())
    while rig.store.after:
        await asyncio.sleep(0.01)
    rig.cancel(driver)
    async with asyncio.timeout(1):
        await is_stopped.wait()
    is_back.set()
    await driving
    assert rig.state.status is Status.CANCELLED
    assert rig.text() == "some "
    assert rig.state.steps["s"].usage == USAGE

"""Pure choices: what follows from a state, a fact and a moment."""

from dataclasses import replace

import pytest

from serve_app.core.decisions import (
    LOSSES_MAX,
    WORKER_LOST,
    ChunkArrived,
    StepErrored,
    StepFinished,
    cancel,
    kept_for_retry,
    progress_percent,
    record,
    take_over,
)
from serve_app.core.due import due_events, is_ending, is_overdue, next_wake_ms
from serve_app.core.errors import AlreadyTerminalError, InvalidRequestError
from serve_app.core.execution import (
    CancelRequested,
    ChunkEmitted,
    Event,
    Execution,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionFailed,
    ExecutionParked,
    ExecutionResumed,
    ExecutionStarted,
    Status,
    StepCompleted,
    StepFailed,
    StepResumed,
    StepRetrying,
    StepSkipped,
    StepStarted,
    StepStatus,
    evolve,
)
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.core.scope import scope_of
from serve_app.core.workflow import Workflow
from tests.support.workflows import (
    FIXED,
    OUTPUT,
    T0,
    USAGE,
    a_chain,
    a_step,
    a_workflow,
    an_execution,
    evaluate,
    folded,
)

BEGUN = ExecutionStarted(T0)
ONE = a_workflow(a_step("s"))
THREE = a_workflow(a_step("s"), a_step("b"), a_step("c"))
RAN = (BEGUN, StepStarted(T0, "s", 1))
CANCELLED_ONE = CancelRequested(T0 + 1, "enough")


def settled(execution: Execution, workflow: Workflow, now_ms: int) -> tuple[Execution, list[Event]]:
    """All that is due at a moment."""
    events: list[Event] = []
    while due := due_events(execution, workflow, now_ms, evaluate):
        execution = folded(execution, due)
        events.extend(due)
    return execution, events


def errored(**members: object) -> StepErrored:
    return StepErrored(**{"step_id": "s", "attempt": 1, "error": "broke", **members})


def recorded(execution: Execution, fact: StepErrored, workflow: Workflow = ONE) -> Event:
    (event,) = record(execution, workflow, fact, T0 + 5, 0.5)
    evolve(execution, event)
    return event


@pytest.mark.parametrize(
    "events", [(), (BEGUN,), RAN, (BEGUN, ExecutionParked(T0, T0 + 9))], ids=lambda e: str(len(e))
)
def test_cancel_asks_for_an_end(events: tuple[Event, ...]) -> None:
    assert cancel(an_execution(*events), "why", T0 + 7) == (CancelRequested(T0 + 7, "why"),)


def test_cancelling_twice_appends_nothing() -> None:
    assert cancel(an_execution(*RAN, CANCELLED_ONE), "again", T0 + 7) == ()


def test_an_ended_execution_cannot_be_cancelled() -> None:
    with pytest.raises(AlreadyTerminalError, match="already completed"):
        cancel(an_execution(BEGUN, ExecutionCompleted(T0, None)), "why", T0 + 7)


@pytest.mark.parametrize("before", [(), RAN, (BEGUN, ExecutionParked(T0, T0 + 900))])
def test_a_cancelled_execution_ends_at_once_with_its_reason(before: tuple[Event, ...]) -> None:
    ended, events = settled(an_execution(*before, CANCELLED_ONE), ONE, T0 + 9)
    assert ended.status is Status.CANCELLED
    assert events[-1] == ExecutionCancelled(T0 + 9, "enough")
    assert all(step.status is StepStatus.CANCELLED for step in ended.steps.values())


def test_a_new_owner_repeats_the_attempts_that_were_under_way_at_once() -> None:
    events = (*RAN, StepStarted(T0, "b", 1), StepStarted(T0, "c", 1), StepCompleted(T0, "c", 1))
    execution = an_execution(*events)
    voided = take_over(execution, THREE, T0 + 50)
    assert voided == tuple(
        StepRetrying(T0 + 50, step_id, 1, 1, T0 + 50, WORKER_LOST) for step_id in ("s", "b")
    )
    again, events = settled(folded(execution, voided), THREE, T0 + 50)
    assert events == [StepStarted(T0 + 50, "s", 1), StepStarted(T0 + 50, "b", 1)]
    assert again.steps["s"].losses == 1


def test_a_new_owner_goes_on_with_what_can_be_gone_on_with() -> None:
    execution = an_execution(*RAN, StepStarted(T0, "b", 1))
    assert take_over(execution, THREE, T0 + 50, {"b", "c"}) == (
        StepRetrying(T0 + 50, "s", 1, 1, T0 + 50, WORKER_LOST),
        StepResumed(T0 + 50, "b"),
    )


@pytest.mark.parametrize(
    "events", [(), (BEGUN,), (BEGUN, ExecutionParked(T0, T0 + 9)), (*RAN, CANCELLED_ONE)]
)
def test_a_new_owner_has_nothing_to_void_where_nothing_runs(events: tuple[Event, ...]) -> None:
    assert take_over(an_execution(*events), ONE, T0 + 50) == ()


def test_a_step_that_loses_its_worker_each_time_ends_some_day() -> None:
    execution, now_ms, delays = an_execution(*RAN), T0, []
    for _ in range(LOSSES_MAX):
        (retrying,) = take_over(execution, ONE, now_ms)
        assert isinstance(retrying, StepRetrying)
        assert retrying.attempt == 1
        delays.append(retrying.wake_at_ms - now_ms)
        now_ms = retrying.wake_at_ms
        execution = folded(execution, (retrying, StepStarted(now_ms, "s", 1)))
    assert delays[:5] == [0, 200, 400, 800, 1600]
    assert set(delays[6:]) == {5000}
    (failed,) = take_over(execution, ONE, now_ms)
    assert failed == StepFailed(
        now_ms, "s", f"{WORKER_LOST}, {LOSSES_MAX} times over", "STEP_FAILED"
    )


def test_a_chunk_is_journalled_with_its_token_ids() -> None:
    events = record(an_execution(*RAN), ONE, ChunkArrived("s", 1, "hi", (4, 5)), T0 + 5, 0.0)
    assert events == (ChunkEmitted(T0 + 5, "s", "hi", (4, 5)),)


def test_an_output_is_journalled_with_its_usage() -> None:
    events = record(an_execution(*RAN), ONE, StepFinished("s", 1, OUTPUT, USAGE), T0 + 5, 0.0)
    assert events == (StepCompleted(T0 + 5, "s", OUTPUT, USAGE),)


@pytest.mark.parametrize(
    "fact",
    [ChunkArrived("s", 1, "x"), StepFinished("s", 1, 1), errored()],
    ids=lambda fact: type(fact).__name__,
)
@pytest.mark.parametrize(
    "events",
    [
        (BEGUN,),
        (*RAN, StepCompleted(T0, "s", 1)),
        (*RAN, StepFailed(T0, "s", "e", "STEP_FAILED")),
        (*RAN, StepRetrying(T0, "s", 1, 1, T0 + 9, "e")),
        (*RAN, StepRetrying(T0, "s", 2, 1, T0 + 9, "e"), StepStarted(T0 + 9, "s", 2)),
        (*RAN, ExecutionFailed(T0, "late", "TIMEOUT")),
    ],
    ids=["not started", "completed", "failed", "retrying", "second attempt", "ended"],
)
def test_a_report_of_a_void_attempt_is_ignored(
    events: tuple[Event, ...], fact: ChunkArrived | StepFinished | StepErrored
) -> None:
    assert record(an_execution(*events), ONE, fact, T0 + 5, 0.0) == ()


def test_a_step_without_a_policy_fails_at_its_first_error() -> None:
    event = recorded(an_execution(*RAN), errored(code="INTERNAL", usage=USAGE))
    assert event == StepFailed(T0 + 5, "s", "broke", "INTERNAL", USAGE)


def test_a_step_uses_up_its_own_policy_before_the_executions() -> None:
    workflow = a_workflow(a_step("s", retry=FIXED))
    execution = an_execution(*RAN, retry=RetryPolicy(1, Backoff.FIXED, initial_delay_ms=1000))
    seen = []
    for attempt in range(1, 7):
        event = recorded(execution, errored(attempt=attempt), workflow)
        if isinstance(event, StepFailed):
            break
        assert isinstance(event, StepRetrying)
        assert event.attempt == attempt + 1
        seen.append((event.execution_attempt, event.wake_at_ms - T0 - 5))
        execution = folded(execution, (event, StepStarted(T0 + 5, "s", event.attempt)))
    assert seen == [(1, 100), (1, 100), (2, 1000), (2, 100), (2, 100)]
    assert execution.attempt == 2


def test_the_jitter_moves_an_exponential_delay_by_a_fifth() -> None:
    execution = an_execution(*RAN, retry=RetryPolicy(3))
    delays = []
    for jitter in (0.0, 0.5, 0.999_999):
        (event,) = record(execution, ONE, errored(), T0, jitter)
        assert isinstance(event, StepRetrying)
        delays.append(event.wake_at_ms - T0)
    assert delays == [800, 1000, 1200]


def test_an_error_that_no_retry_can_cure_fails_at_once() -> None:
    workflow = a_workflow(a_step("s", retry=FIXED))
    execution = an_execution(*RAN, retry=FIXED)
    event = recorded(execution, errored(code="INVALID_PROMPT", is_retryable=False), workflow)
    assert event == StepFailed(T0 + 5, "s", "broke", "INVALID_PROMPT")


@pytest.mark.parametrize(
    "code", ["CONNECTION_FAILED", "NO_HOSTS_AVAILABLE", "OVERLOADED", "RATE_LIMIT_EXCEEDED"]
)
@pytest.mark.parametrize("is_retryable", [True, False])
def test_a_lost_replica_is_not_the_users_retry(code: str, is_retryable: bool) -> None:
    fact = errored(code=code, is_retryable=is_retryable, usage=USAGE)
    event = recorded(an_execution(*RAN), fact)
    assert event == StepRetrying(T0 + 5, "s", 1, 1, T0 + 5, "broke", USAGE)


def test_a_step_that_cancels_itself_has_failed() -> None:
    event = recorded(an_execution(*RAN), errored(code="CANCELLED"))
    assert event == StepFailed(T0 + 5, "s", "broke", "STEP_FAILED")


@pytest.mark.parametrize("code", ["CANCELLED", "STEP_FAILED", "CONNECTION_FAILED"])
def test_while_cancelling_every_error_is_the_cancel(code: str) -> None:
    execution = an_execution(*RAN, CANCELLED_ONE, retry=FIXED)
    event = recorded(execution, errored(code=code, usage=USAGE))
    assert event == StepFailed(T0 + 5, "s", "broke", "CANCELLED", USAGE)


def test_while_cancelling_an_output_comes_too_late_but_its_tokens_count() -> None:
    execution = an_execution(*RAN, CANCELLED_ONE)
    events = record(execution, ONE, StepFinished("s", 1, OUTPUT, USAGE), T0 + 5, 0.0)
    assert events == (StepFailed(T0 + 5, "s", "aborted", "CANCELLED", USAGE),)


def test_an_abort_at_the_deadline_uses_up_no_retry() -> None:
    execution = an_execution(*RAN, timeout_ms=5, retry=FIXED)
    event = recorded(execution, errored(code="CANCELLED", error="aborted"))
    assert event == StepFailed(T0 + 5, "s", "aborted", "TIMEOUT")


def test_an_abort_for_a_failed_neighbour_uses_up_no_retry() -> None:
    execution = an_execution(
        *RAN,
        StepStarted(T0, "b", 1),
        StepFailed(T0, "b", "broke", "STEP_FAILED"),
        retry=FIXED,
    )
    event = recorded(execution, errored(code="CANCELLED", error="aborted"))
    assert event == StepFailed(T0 + 5, "s", "aborted", "CANCELLED")
    ended, _ = settled(evolve(execution, event), a_workflow(a_step("s"), a_step("b")), T0 + 5)
    assert (ended.attempt, ended.error) == (1, "step b: broke")


def test_a_pending_execution_starts_and_its_first_steps_with_it() -> None:
    workflow = a_workflow(a_step("a"), a_step("b"), a_step("c", needs=("a", "b")))
    execution, events = settled(an_execution(), workflow, T0 + 9)
    started = [StepStarted(T0 + 9, "a", 1), StepStarted(T0 + 9, "b", 1)]
    assert events == [ExecutionStarted(T0 + 9), *started]
    half = evolve(execution, StepCompleted(T0 + 9, "a", 1))
    assert settled(half, workflow, T0 + 9)[1] == []
    both = evolve(half, StepCompleted(T0 + 9, "b", 1))
    assert settled(both, workflow, T0 + 10)[1] == [StepStarted(T0 + 10, "c", 1)]


def test_nothing_is_due_after_the_end() -> None:
    assert settled(an_execution(BEGUN, ExecutionCompleted(T0, 1)), ONE, T0 + 10**9)[1] == []


def test_the_last_steps_output_is_the_result_by_default() -> None:
    _, events = settled(an_execution(*RAN, StepCompleted(T0, "s", OUTPUT)), ONE, T0 + 9)
    assert events == [ExecutionCompleted(T0 + 9, OUTPUT)]


def test_the_output_of_the_definition_is_rendered() -> None:
    workflow = a_workflow(
        *a_chain(a_step("s"), a_step("t", when="false")),
        output={
            "said": "{{ steps.s.output }}",
            "to": "{{ input.name }}",
            "t": "{{ steps.t.output }}",
        },
    )
    _, events = settled(an_execution(*RAN, StepCompleted(T0, "s", 5)), workflow, T0 + 9)
    said = {"said": 5, "to": "Ada", "t": None}
    assert events == [StepSkipped(T0 + 9, "t"), ExecutionCompleted(T0 + 9, said)]


def test_an_output_that_cannot_be_had_fails_the_execution() -> None:
    workflow = a_workflow(a_step("s"), output="{{ input.nobody }}")
    _, events = settled(an_execution(*RAN, StepCompleted(T0, "s", 5)), workflow, T0 + 9)
    assert events == [ExecutionFailed(T0 + 9, "output: no such key: nobody", "STEP_FAILED")]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("true", [StepStarted(T0, "s", 1)]),
        ("false", [StepSkipped(T0, "s"), ExecutionCompleted(T0, None)]),
    ],
)
def test_a_condition_decides_whether_a_step_starts(when: str, expected: list[Event]) -> None:
    assert settled(an_execution(BEGUN), a_workflow(a_step("s", when=when)), T0)[1] == expected


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("1", "when: the expression must give true or false"),
        ("input", "when: the expression must give true or false"),
        ("input.nobody", "when: no such key: nobody"),
    ],
)
def test_a_condition_that_gives_no_verdict_fails_the_step(when: str, error: str) -> None:
    workflow = a_workflow(a_step("s", when=when))
    execution, events = settled(an_execution(BEGUN, retry=FIXED), workflow, T0)
    assert events == [
        StepStarted(T0, "s", 1),
        StepFailed(T0, "s", error, "STEP_FAILED"),
        ExecutionFailed(T0, f"step s: {error}", "STEP_FAILED"),
    ]
    assert execution.status is Status.FAILED


def test_a_skipped_step_is_done_for_those_who_need_it() -> None:
    workflow = a_workflow(*a_chain(a_step("s", when="false"), a_step("t")))
    assert settled(an_execution(BEGUN), workflow, T0)[1] == [
        StepSkipped(T0, "s"),
        StepStarted(T0, "t", 1),
    ]


def test_an_execution_parks_until_its_retry_and_then_goes_on() -> None:
    waiting = an_execution(*RAN, StepRetrying(T0, "s", 2, 1, T0 + 100, "e"))
    parked, events = settled(waiting, ONE, T0 + 1)
    assert events == [ExecutionParked(T0 + 1, T0 + 100)]
    assert settled(parked, ONE, T0 + 99)[1] == []
    _, events = settled(parked, ONE, T0 + 100)
    assert events == [ExecutionResumed(T0 + 100), StepStarted(T0 + 100, "s", 2)]


def test_an_execution_does_not_park_while_another_step_runs() -> None:
    events = (*RAN, StepStarted(T0, "b", 1), StepRetrying(T0, "s", 2, 1, T0 + 100, "e"))
    workflow = a_workflow(a_step("s"), a_step("b"))
    waiting = an_execution(*events)
    assert settled(waiting, workflow, T0 + 1)[1] == []
    assert settled(waiting, workflow, T0 + 100)[1] == [StepStarted(T0 + 100, "s", 2)]
    _, events = settled(evolve(waiting, StepCompleted(T0 + 2, "b", 1)), workflow, T0 + 2)
    assert events == [ExecutionParked(T0 + 2, T0 + 100)]


def test_an_execution_parks_no_longer_than_its_deadline() -> None:
    waiting = an_execution(*RAN, StepRetrying(T0, "s", 2, 1, T0 + 100, "e"), timeout_ms=60)
    parked, events = settled(waiting, ONE, T0 + 1)
    assert events == [ExecutionParked(T0 + 1, T0 + 60)]
    assert settled(parked, ONE, T0 + 60)[1] == [
        ExecutionFailed(T0 + 60, "not done within 60 ms", "TIMEOUT")
    ]


@pytest.mark.parametrize(
    ("events", "steps"),
    [
        ((), {}),
        (RAN, {"s": StepStatus.FAILED}),
        (
            (*RAN, StepRetrying(T0, "s", 2, 1, T0 + 90, "e"), ExecutionParked(T0, T0 + 50)),
            {"s": StepStatus.RETRYING},
        ),
    ],
    ids=["pending", "running", "waiting"],
)
def test_past_its_deadline_an_execution_fails(
    events: tuple[Event, ...], steps: dict[str, StepStatus]
) -> None:
    execution = an_execution(*events, timeout_ms=50)
    assert not is_overdue(execution, T0 + 49)
    assert is_overdue(execution, T0 + 50)
    ended, due = settled(execution, ONE, T0 + 50)
    assert due[-1] == ExecutionFailed(T0 + 50, "not done within 50 ms", "TIMEOUT")
    assert {step_id: step.status for step_id, step in ended.steps.items()} == steps


def test_the_deadline_does_not_undo_a_cancel() -> None:
    ended, _ = settled(an_execution(*RAN, CANCELLED_ONE, timeout_ms=5), ONE, T0 + 50)
    assert ended.status is Status.CANCELLED
    assert ended.steps["s"].status is StepStatus.CANCELLED


def test_a_failed_step_ends_the_execution_and_cancels_what_still_runs() -> None:
    execution = an_execution(
        *RAN, StepStarted(T0, "b", 1), StepFailed(T0, "b", "broke", "INVALID_PROMPT")
    )
    assert is_ending(execution, T0)
    ended, events = settled(execution, a_workflow(a_step("s"), a_step("b"), a_step("c")), T0 + 9)
    assert events == [
        StepFailed(T0 + 9, "s", "aborted", "CANCELLED"),
        ExecutionFailed(T0 + 9, "step b: broke", "STEP_FAILED"),
    ]
    assert "c" not in ended.steps


@pytest.mark.parametrize(
    ("from_step", "kept"), [(None, {}), ("a", {"d": 4}), ("b", {"a": 1, "d": 4}), ("d", {"a": 1})]
)
def test_a_retry_keeps_what_does_not_follow_from_its_step(
    from_step: str | None, kept: dict[str, int]
) -> None:
    chain = a_chain(a_step("a"), a_step("b"), a_step("c"))
    workflow = a_workflow(*chain, a_step("d"), a_step("e", when="false"))
    execution, _ = settled(an_execution(), workflow, T0)
    for step_id, output in (("a", 1), ("d", 4)):
        execution = evolve(execution, StepCompleted(T0, step_id, output))
    execution, _ = settled(execution, workflow, T0)
    execution = folded(execution, (StepFailed(T0, "b", "e", "STEP_FAILED"),))
    assert kept_for_retry(execution, workflow, from_step) == kept


def test_a_retry_from_a_step_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no step 'x'"):
        kept_for_retry(an_execution(), ONE, "x")


def test_kept_steps_do_not_run_again() -> None:
    workflow = a_workflow(*a_chain(a_step("a"), a_step("b")), output="{{ steps.a.output }}")
    execution, events = settled(an_execution(kept={"a": 1}), workflow, T0)
    assert events == [ExecutionStarted(T0), StepStarted(T0, "b", 1)]
    ended, _ = settled(evolve(execution, StepCompleted(T0, "b", 2)), workflow, T0)
    assert (ended.status, ended.data) == (Status.COMPLETED, 1)


def test_the_next_wake_is_the_earliest_retry_or_the_deadline() -> None:
    assert next_wake_ms(an_execution(*RAN)) is None
    assert next_wake_ms(an_execution(*RAN, timeout_ms=500)) == T0 + 500
    retrying = an_execution(
        *RAN,
        StepStarted(T0, "b", 1),
        StepRetrying(T0, "s", 2, 1, T0 + 100, "e"),
        StepRetrying(T0, "b", 2, 1, T0 + 70, "e"),
        timeout_ms=500,
    )
    assert next_wake_ms(retrying) == T0 + 70
    assert next_wake_ms(evolve(retrying, StepStarted(T0 + 70, "b", 2))) == T0 + 100


def test_progress_counts_the_steps_that_are_done() -> None:
    workflow, execution = THREE, an_execution(*RAN)
    assert progress_percent(execution, workflow) == 0
    one = evolve(execution, StepCompleted(T0, "s", 1))
    assert progress_percent(one, workflow) == 33
    two = evolve(one, StepSkipped(T0, "b"))
    assert progress_percent(two, workflow) == 66
    assert progress_percent(two, None) == 0
    assert progress_percent(evolve(two, ExecutionCompleted(T0, 1)), None) == 100


def test_an_expression_sees_the_input_finished_outputs_and_the_execution() -> None:
    execution = an_execution(
        *RAN, StepCompleted(T0, "s", OUTPUT), StepSkipped(T0, "b"), StepStarted(T0, "c", 1)
    )
    scope = scope_of(replace(execution, attempt=2), THREE)
    assert scope["steps"] == {"s": {"output": OUTPUT}, "b": {"output": None}}
    assert scope["input"] == {"name": "Ada"}
    assert scope["execution"] == {
        "id": execution.id,
        "workflowId": "wf",
        "workflowVersion": 3,
        "workspaceId": "w1",
        "userId": "u1",
        "metadata": {"ticket": 7},
        "attempt": 2,
    }

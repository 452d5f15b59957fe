"""The transition table and the fold: what may follow what, and what each event changes."""

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest

from serve_app.core.errors import IllegalTransitionError
from serve_app.core.execution import (
    KIND_OF,
    KINDS,
    TERMINAL,
    TRANSITIONS,
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
    StepState,
    StepStatus,
    evolve,
    new_execution,
)
from serve_app.core.inference import Resumed, Usage
from tests.support.workflows import (
    CREATED,
    EXAMPLES,
    EXECUTION_ID,
    OUTPUT,
    T0,
    USAGE,
    an_execution,
    folded,
)

STARTED = (ExecutionStarted(T0 + 10), StepStarted(T0 + 20, "ran", 1))


def in_status(status: Status) -> Execution:
    """An execution with one running step, put into a status by hand."""
    step = StepState(StepStatus.RUNNING, 1, 1, T0)
    return Execution(EXECUTION_ID, 5, status, CREATED, steps={"ran": step})


@pytest.mark.parametrize(("status", "kind"), list(product(Status, KINDS)))
def test_only_table_rows_are_legal(status: Status, kind: str) -> None:
    event = EXAMPLES[KINDS[kind]]
    expected = TRANSITIONS.get((status, KINDS[kind]))
    if expected is None:
        with pytest.raises(IllegalTransitionError, match=KINDS[kind].__name__):
            evolve(in_status(status), event)
    else:
        after = evolve(in_status(status), event)
        assert (after.status, after.seq) == (expected, 6)


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_nothing_follows_a_terminal_status(status: Status) -> None:
    assert [kind for before, kind in TRANSITIONS if before == status] == []
    assert in_status(status).is_terminal


def test_every_status_is_reached_and_every_one_leads_to_an_end() -> None:
    reached = {Status.PENDING} | set(TRANSITIONS.values())
    assert reached == set(Status)
    leads_to_end = set(TERMINAL)
    for _ in Status:
        leads_to_end |= {
            before for (before, _), after in TRANSITIONS.items() if after in leads_to_end
        }
    assert leads_to_end == set(Status)


def test_every_event_has_one_persisted_name() -> None:
    assert set(KINDS.values()) == set(get_args(Event)) == set(EXAMPLES)
    assert {kind: KIND_OF[cls] for kind, cls in KINDS.items()} == {kind: kind for kind in KINDS}


def test_persisted_names_never_change() -> None:
    assert set(KINDS) >= {
        "execution.created",
        "execution.started",
        "step.started",
        "chunk",
        "step.completed",
        "step.skipped",
        "step.retrying",
        "step.failed",
        "execution.parked",
        "execution.resumed",
        "cancel.requested",
        "execution.completed",
        "execution.failed",
        "execution.cancelled",
    }


def test_a_new_execution_is_pending_at_its_first_event() -> None:
    execution = new_execution(EXECUTION_ID, CREATED)
    assert (execution.seq, execution.status, execution.attempt) == (1, Status.PENDING, 1)
    assert not execution.is_terminal
    assert execution.usage == Usage()


def test_a_retry_begins_with_the_steps_it_keeps() -> None:
    execution = new_execution(EXECUTION_ID, replace(CREATED, kept={"ran": OUTPUT}))
    assert execution.steps == {"ran": StepState(StepStatus.COMPLETED, 0, 0, T0, T0, OUTPUT)}


def test_the_deadline_counts_from_acceptance() -> None:
    assert CREATED.deadline_ms is None
    assert replace(CREATED, timeout_ms=500).deadline_ms == T0 + 500


def test_evolve_leaves_the_state_before_as_it_was() -> None:
    before = an_execution(*STARTED)
    evolve(before, StepCompleted(T0 + 40, "ran", OUTPUT))
    assert before == an_execution(*STARTED)


def test_a_step_runs_from_its_start_to_its_output() -> None:
    after = an_execution(
        *STARTED, ChunkEmitted(T0 + 30, "ran", "hi"), StepCompleted(T0 + 40, "ran", OUTPUT, USAGE)
    )
    assert after.started_at_ms == T0 + 10
    assert after.seq == 5
    assert after.steps["ran"] == StepState(
        StepStatus.COMPLETED, 1, 1, T0 + 20, T0 + 40, OUTPUT, usage=USAGE, began_seq=3
    )
    assert after.usage == USAGE


def test_a_chunk_changes_nothing_but_the_sequence() -> None:
    before = an_execution(*STARTED)
    assert evolve(before, ChunkEmitted(T0, "ran", "x")) == replace(before, seq=before.seq + 1)


def test_a_skipped_step_has_no_attempt_and_no_output() -> None:
    step = an_execution(STARTED[0], StepSkipped(T0 + 50, "new")).steps["new"]
    assert step == StepState(StepStatus.SKIPPED, 0, 0, T0 + 50, T0 + 50)


def test_a_retry_of_the_step_counts_an_attempt_and_keeps_the_usage() -> None:
    waiting = an_execution(*STARTED, StepRetrying(T0 + 60, "ran", 2, 1, T0 + 90, "broke", USAGE))
    step = waiting.steps["ran"]
    assert (step.status, step.attempt, step.tries) == (StepStatus.RETRYING, 2, 2)
    assert (step.wake_at_ms, step.error, step.usage, step.losses) == (T0 + 90, "broke", USAGE, 0)
    assert waiting.attempt == 1
    again = evolve(waiting, StepStarted(T0 + 90, "ran", 2))
    step = again.steps["ran"]
    assert (step.status, step.attempt, step.wake_at_ms) == (StepStatus.RUNNING, 2, None)
    assert step.started_at_ms == T0 + 20
    done = evolve(again, StepCompleted(T0 + 99, "ran", OUTPUT, USAGE)).steps["ran"]
    assert (done.error, done.usage) == (None, USAGE + USAGE)


def test_a_retry_of_the_execution_starts_the_tries_of_the_step_again() -> None:
    events = (
        *STARTED,
        StepRetrying(T0 + 60, "ran", 2, 1, T0 + 90, "broke"),
        StepStarted(T0 + 90, "ran", 2),
        StepRetrying(T0 + 95, "ran", 3, 2, T0 + 120, "broke"),
    )
    after = an_execution(*events)
    assert after.attempt == 2
    assert (after.steps["ran"].attempt, after.steps["ran"].tries) == (3, 1)


def test_a_step_that_another_worker_goes_on_with_is_the_same_attempt() -> None:
    before = an_execution(*STARTED, ChunkEmitted(T0 + 30, "ran", "hi", (1,)))
    step = evolve(before, StepResumed(T0 + 60, "ran")).steps["ran"]
    assert step == replace(before.steps["ran"], losses=1)
    done = StepCompleted(T0 + 70, "ran", OUTPUT, USAGE, Resumed.EXACT)
    assert evolve(before, done).steps["ran"].resumed is Resumed.EXACT


def test_a_step_knows_where_its_present_attempt_began() -> None:
    retried = (StepRetrying(T0, "ran", 2, 1, T0, "e"), StepStarted(T0, "ran", 2))
    after = an_execution(*STARTED, ChunkEmitted(T0, "ran", "hi"), *retried)
    assert (after.steps["ran"].began_seq, after.seq) == (6, 6)


def test_a_lost_worker_repeats_the_same_attempt_and_counts_a_loss() -> None:
    step = an_execution(*STARTED, StepRetrying(T0 + 60, "ran", 1, 1, T0 + 60, "lost")).steps["ran"]
    assert (step.attempt, step.tries, step.losses) == (1, 1, 1)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("STEP_FAILED", StepStatus.FAILED),
        ("TIMEOUT", StepStatus.FAILED),
        ("CANCELLED", StepStatus.CANCELLED),
    ],
)
def test_a_failed_step_tells_a_failure_from_a_cancel(code: str, status: StepStatus) -> None:
    step = an_execution(*STARTED, StepFailed(T0 + 70, "ran", "why", code, USAGE)).steps["ran"]
    assert (step.status, step.error, step.usage) == (status, "why", USAGE)
    assert step.completed_at_ms == T0 + 70


def test_parking_sets_the_wake_time_and_resuming_clears_it() -> None:
    parked = an_execution(STARTED[0], ExecutionParked(T0 + 80, T0 + 500))
    assert (parked.status, parked.wake_at_ms) == (Status.WAITING, T0 + 500)
    resumed = evolve(parked, ExecutionResumed(T0 + 500))
    assert (resumed.status, resumed.wake_at_ms) == (Status.RUNNING, None)


def test_a_cancel_request_wakes_a_parked_execution_and_keeps_the_reason() -> None:
    parked = an_execution(STARTED[0], ExecutionParked(T0 + 80, T0 + 500))
    cancelling = evolve(parked, CancelRequested(T0 + 90, "enough"))
    assert (cancelling.status, cancelling.wake_at_ms) == (Status.CANCELLING, None)
    assert cancelling.cancel_reason == "enough"
    ended = evolve(cancelling, ExecutionCancelled(T0 + 99, "enough"))
    assert (ended.status, ended.error, ended.error_code) == (
        Status.CANCELLED,
        "enough",
        "CANCELLED",
    )
    assert ended.completed_at_ms == T0 + 99


def test_completion_keeps_the_data_and_failure_the_error() -> None:
    done = an_execution(STARTED[0], ExecutionCompleted(T0 + 110, OUTPUT))
    assert (done.data, done.error, done.completed_at_ms) == (OUTPUT, None, T0 + 110)
    parked = an_execution(STARTED[0], ExecutionParked(T0 + 80, T0 + 500))
    failed = evolve(parked, ExecutionFailed(T0 + 120, "late", "TIMEOUT"))
    assert (failed.error, failed.error_code, failed.wake_at_ms) == ("late", "TIMEOUT", None)


STEP_KINDS = (
    "step.started",
    "chunk",
    "step.resumed",
    "step.completed",
    "step.skipped",
    "step.retrying",
    "step.failed",
)
# Each entry: what the step went through, and the events that cannot come now.
STEP_HISTORIES = {
    "not started": (
        (),
        ("chunk", "step.resumed", "step.completed", "step.retrying", "step.failed"),
    ),
    "running": ((StepStarted(T0, "s", 1),), ("step.started", "step.skipped")),
    "retrying": (
        (StepStarted(T0, "s", 1), StepRetrying(T0, "s", 2, 1, T0 + 9, "e")),
        ("chunk", "step.resumed", "step.completed", "step.skipped", "step.retrying"),
    ),
    "completed": (
        (StepStarted(T0, "s", 1), StepCompleted(T0, "s", 1)),
        STEP_KINDS,
    ),
    "skipped": (
        (StepSkipped(T0, "s"),),
        STEP_KINDS,
    ),
    "failed": (
        (StepStarted(T0, "s", 1), StepFailed(T0, "s", "e", "STEP_FAILED")),
        STEP_KINDS,
    ),
    "cancelled": (
        (StepStarted(T0, "s", 1), StepFailed(T0, "s", "e", "CANCELLED")),
        STEP_KINDS,
    ),
}


@pytest.mark.parametrize(("history", "kind"), list(product(STEP_HISTORIES, STEP_KINDS)))
def test_a_step_takes_only_what_its_status_allows(history: str, kind: str) -> None:
    events, refused = STEP_HISTORIES[history]
    execution = folded(an_execution(STARTED[0]), events)
    event = replace(EXAMPLES[KINDS[kind]], step_id="s")
    if kind in refused:
        with pytest.raises(IllegalTransitionError, match="step s"):
            evolve(execution, event)
    else:
        assert evolve(execution, event).seq == execution.seq + 1

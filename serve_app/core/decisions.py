"""What follows from a report or a wish: pure choices over one execution.

Owns cancel, take-over, retries, and what a step's report becomes; `due.py` has what follows by
itself. Awaits nothing and reads no clock: time and jitter come in as arguments. Invariant: every
function returns events that `evolve` accepts in the order given; the same arguments give the same
events, so a decision that lost a race is simply taken again.
"""

from collections.abc import Collection
from dataclasses import dataclass

from serve_app.core.blocks import is_composite, progress_share
from serve_app.core.due import cut_off_code, is_ending
from serve_app.core.errors import (
    AlreadyTerminalError,
    ErrorCode,
    InvalidRequestError,
    TooManySignalsError,
)
from serve_app.core.execution import (
    CancelRequested,
    ChunkEmitted,
    Event,
    Execution,
    GateAnswered,
    SignalReceived,
    Status,
    StepCompleted,
    StepFailed,
    StepProgressed,
    StepResumed,
    StepRetrying,
    StepState,
    StepStatus,
    StepWaiting,
    Wait,
)
from serve_app.core.failures import StepErrored, after_failure
from serve_app.core.gates import Verdict
from serve_app.core.inference import NO_USAGE, JsonValue, Resumed, Usage
from serve_app.core.journal import EXECUTION_ID_PREFIX, Outgoing
from serve_app.core.rounds import cut_off
from serve_app.core.scope import block_of
from serve_app.core.waits import SIGNALS_MAX
from serve_app.core.workflow import Workflow

WORKER_LOST = "its worker was lost"
# A step that takes its worker or replica down each time must end some day; an outage must not end
# it early, and a large model takes minutes to load: with the delays below, 100 losses are eight.
LOSSES_MAX = 100
RESUMES_MAX = 5  # losses after which an answer begins anew, ever later: going on may be the cause
_LOSS_DELAY_MS = 100
_LOSS_DELAY_MAX_MS = 5_000
# What never began is no try of the user's either: it was lost, or refused before any work.
_LOSS_CODES = (
    ErrorCode.CONNECTION_FAILED,
    ErrorCode.NO_HOSTS_AVAILABLE,
    ErrorCode.OVERLOADED,
    ErrorCode.RATE_LIMIT_EXCEEDED,
)


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A running step produced text."""

    step_id: str
    attempt: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A running step has its output."""

    step_id: str
    attempt: int
    output: JsonValue
    usage: Usage = NO_USAGE
    resumed: Resumed | None = None


@dataclass(frozen=True, slots=True)
class Progressed:
    """A running step says how far the execution is, 0 to 100."""

    step_id: str
    attempt: int
    progress: float
    message: str


@dataclass(frozen=True, slots=True)
class StepHandedOver:
    """A running step has done its part and waits; the message leaves as it begins to."""

    step_id: str
    attempt: int
    wait: Wait
    outgoing: Outgoing
    usage: Usage = NO_USAGE


Fact = ChunkArrived | Progressed | StepFinished | StepHandedOver | StepErrored


def cancel(execution: Execution, reason: str, now_ms: int) -> tuple[Event, ...]:
    """Ask for an end; nothing to append when somebody asked already.

    Raises:
        AlreadyTerminalError: it has ended.
    """
    if execution.is_terminal:
        raise AlreadyTerminalError(f"execution {execution.id} is already {execution.status}")
    if execution.status is Status.CANCELLING:
        return ()
    return (CancelRequested(now_ms, reason),)


def receive(execution: Execution, name: str, data: JsonValue, now_ms: int) -> tuple[Event, ...]:
    """Take a signal in; it is kept until a step waits for it.

    Raises:
        AlreadyTerminalError: it has ended.
        InvalidRequestError: the name is that of an execution, which only a child's end bears.
        TooManySignalsError: as many as are kept wait already.
    """
    if execution.is_terminal:
        raise AlreadyTerminalError(f"execution {execution.id} is already {execution.status}")
    if name.startswith(EXECUTION_ID_PREFIX):
        raise InvalidRequestError(f"a signal's name does not begin with {EXECUTION_ID_PREFIX}")
    if len(execution.signals) >= SIGNALS_MAX:
        raise TooManySignalsError(f"{SIGNALS_MAX} signals wait for a step already")
    return (SignalReceived(now_ms, name, data),)


def gate_answered(
    execution: Execution, verdict: Verdict, value: JsonValue, now_ms: int
) -> tuple[Event, ...]:
    """Take what its gates answered; nothing to append where that is known or came too late."""
    if execution.status is not Status.PENDING or not execution.is_at_gate:
        return ()
    return (GateAnswered(now_ms, verdict, value),)


def take_over(
    execution: Execution, workflow: Workflow, now_ms: int, resumable: Collection[str] = ()
) -> tuple[Event, ...]:
    """Void what a lost worker had under way; the steps start again, as the same attempts.

    A composite has nothing under way but its inner steps. What `resumable` names is not void: it
    goes on behind what it has emitted (`core.emitted`).
    """
    return tuple(
        StepResumed(now_ms, path)
        if path in resumable
        else _after_loss(execution, path, execution.steps[path], WORKER_LOST, now_ms)
        for path in orphans(execution, workflow)
    )


def orphans(execution: Execution, workflow: Workflow) -> tuple[str, ...]:
    """The steps that a worker had under way and lost, when another takes the execution over."""
    if execution.status is not Status.RUNNING:
        return ()
    return tuple(
        path
        for path in execution.live_steps
        if execution.steps[path].status is StepStatus.RUNNING and not is_composite(workflow, path)
    )


def record(
    execution: Execution, workflow: Workflow, fact: Fact, now_ms: int, jitter: float
) -> tuple[Event, ...]:
    """Turn what a step run reported into events; a report of a void attempt gives none.

    `jitter` is in [0, 1), drawn by the caller.
    """
    step = execution.steps.get(fact.step_id)
    is_open = execution.status in (Status.RUNNING, Status.CANCELLING)
    is_running = step is not None and step.status is StepStatus.RUNNING
    if step is None or not is_open or not is_running or step.attempt != fact.attempt:
        return ()
    is_cancelling = execution.status is Status.CANCELLING
    match fact:
        case ChunkArrived(step_id=step_id, text=text, token_ids=token_ids):
            return (ChunkEmitted(now_ms, step_id, text, token_ids),)
        case Progressed(step_id=step_id, progress=progress, message=message):
            said = StepProgressed(now_ms, step_id, progress, message)
            return () if is_cancelling else (said,)
        case StepFinished(step_id=step_id, output=output, usage=usage, resumed=resumed):
            cut = cut_off(step_id, ErrorCode.CANCELLED, now_ms, usage)
            done = StepCompleted(now_ms, step_id, output, usage, resumed)
            return (cut if is_cancelling else done,)
        case StepHandedOver(step_id=step_id, wait=wait):
            cut = cut_off(step_id, ErrorCode.CANCELLED, now_ms)
            return (cut if is_cancelling else StepWaiting(now_ms, step_id, wait),)
        case StepErrored():
            return (_after_error(execution, workflow, step, fact, now_ms, jitter),)


def kept_for_retry(
    execution: Execution, workflow: Workflow, from_step: str | None
) -> dict[str, JsonValue]:
    """Outputs that a retry takes over: of completed steps that do not follow from `from_step`.

    A composite is kept as a whole or runs again as a whole.

    Raises:
        InvalidRequestError: the workflow has no such step outside of composites.
    """
    if from_step is None:
        return {}
    if from_step not in {step.id for step in workflow.steps}:
        raise InvalidRequestError(f"the workflow has no step {from_step!r}")
    void = {from_step}
    while grown := {s.id for s in workflow.steps if s.id not in void and void & set(s.needs)}:
        void |= grown
    return {
        step_id: step.output
        for step_id, step in execution.steps.items()
        if step.status is StepStatus.COMPLETED and step_id not in void and not block_of(step_id)
    }


def progress_percent(execution: Execution, workflow: Workflow | None) -> int:
    """What a step last published, 0 to 100, else the finished steps of all.

    A composite counts as far as its blocks are done.
    """
    if execution.status is Status.COMPLETED:
        return 100
    if execution.progress is not None:
        return int(execution.progress)
    return 0 if workflow is None else int(100 * progress_share(execution, workflow, ""))


def _after_error(
    execution: Execution,
    workflow: Workflow,
    step: StepState,
    fact: StepErrored,
    now_ms: int,
    jitter: float,
) -> Event:
    if fact.is_aborted or is_ending(execution, now_ms):
        # No try is left to an execution that ends, so none may be counted.
        is_own_fault = (
            fact.code != ErrorCode.CANCELLED and execution.status is not Status.CANCELLING
        )
        code = fact.code if is_own_fault else cut_off_code(execution, now_ms)
        return StepFailed(now_ms, fact.step_id, fact.error, code, fact.usage)
    if fact.code in _LOSS_CODES:
        return _after_loss(execution, fact.step_id, step, fact.error, now_ms, fact.usage)
    return after_failure(execution, workflow, fact, now_ms, jitter)


def _after_loss(
    execution: Execution,
    step_id: str,
    step: StepState,
    error: str,
    now_ms: int,
    usage: Usage = NO_USAGE,
) -> Event:
    """The same attempt again: a dead worker or replica is not the user's retry."""
    if step.losses >= LOSSES_MAX:
        return StepFailed(
            now_ms, step_id, f"{error}, {LOSSES_MAX} times over", ErrorCode.STEP_FAILED, usage
        )
    is_first = step.losses == 0
    delay_ms = 0 if is_first else min(_LOSS_DELAY_MS << step.losses, _LOSS_DELAY_MAX_MS)
    return StepRetrying(
        now_ms, step_id, step.attempt, execution.attempt, now_ms + delay_ms, error, usage
    )

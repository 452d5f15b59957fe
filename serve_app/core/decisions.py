"""What follows from a state: pure choices over one execution.

Owns cancel, retries, deadlines, which steps start, when an execution parks and how it ends. Awaits
nothing and reads no clock: time, jitter and the expression evaluator come in as arguments.
Invariant: every function returns events that `evolve` accepts in the order given; the same
arguments give the same events, so a decision that lost a race is simply taken again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve_app.core.errors import (
    AlreadyTerminalError,
    ErrorCode,
    InvalidRequestError,
    StepFailedError,
)
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
    StepRetrying,
    StepSkipped,
    StepStarted,
    StepState,
    StepStatus,
)
from serve_app.core.inference import NO_USAGE, JsonValue, Usage
from serve_app.core.retry import retry_delay_ms
from serve_app.core.template import render
from serve_app.core.workflow import Step, Workflow, ready_steps

Scope = Mapping[str, object]
Evaluate = Callable[[str, Scope], object]

WORKER_LOST = "its worker was lost"
# A step that takes its worker or replica down each time must end some day; an outage must not end
# it early, and a large model takes minutes to load: with the delays below, 100 losses are eight.
LOSSES_MAX = 100
_LOSS_DELAY_MS = 100
_LOSS_DELAY_MAX_MS = 5_000
_LOSS_CODES = (ErrorCode.CONNECTION_FAILED, ErrorCode.NO_HOSTS_AVAILABLE)


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


@dataclass(frozen=True, slots=True)
class StepErrored:
    """A running step ended without an output; `code` is CANCELLED when it was aborted."""

    step_id: str
    attempt: int
    error: str
    code: str = ErrorCode.STEP_FAILED
    is_retryable: bool = True
    usage: Usage = NO_USAGE


Fact = ChunkArrived | StepFinished | StepErrored


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


def take_over(execution: Execution, now_ms: int) -> tuple[Event, ...]:
    """Void what a lost worker had under way; the steps start again, as the same attempts."""
    if execution.status is not Status.RUNNING:
        return ()
    return tuple(
        _after_loss(execution, step_id, step, WORKER_LOST, now_ms)
        for step_id, step in execution.steps.items()
        if step.status is StepStatus.RUNNING
    )


def record(
    execution: Execution, workflow: Workflow, fact: Fact, now_ms: int, jitter: float
) -> tuple[Event, ...]:
    """Turn what a step run reported into events; a report of a void attempt gives none.

    `jitter` is in [0, 1), drawn by the caller.
    """
    step = execution.steps.get(fact.step_id)
    if step is None or step.status is not StepStatus.RUNNING or step.attempt != fact.attempt:
        return ()
    if execution.status not in (Status.RUNNING, Status.CANCELLING):
        return ()
    match fact:
        case ChunkArrived(step_id=step_id, text=text, token_ids=token_ids):
            return (ChunkEmitted(now_ms, step_id, text, token_ids),)
        case StepFinished(step_id=step_id, output=output, usage=usage):
            if execution.status is Status.CANCELLING:
                return (_cut_off(step_id, ErrorCode.CANCELLED, now_ms, usage),)
            return (StepCompleted(now_ms, step_id, output, usage),)
        case StepErrored():
            return (_after_error(execution, workflow, step, fact, now_ms, jitter),)


def kept_for_retry(
    execution: Execution, workflow: Workflow, from_step: str | None
) -> dict[str, JsonValue]:
    """Outputs that a retry takes over: of completed steps that do not follow from `from_step`.

    Raises:
        InvalidRequestError: the workflow has no such step.
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
        if step.status is StepStatus.COMPLETED and step_id not in void
    }


def is_ending(execution: Execution, now_ms: int) -> bool:
    """Whether the steps under way must be aborted because the execution ends now."""
    return (
        execution.status is Status.CANCELLING
        or is_overdue(execution, now_ms)
        or any(step.status is StepStatus.FAILED for step in execution.steps.values())
    )


def is_overdue(execution: Execution, now_ms: int) -> bool:
    """Whether the deadline has passed before it ended."""
    deadline_ms = execution.created.deadline_ms
    return not execution.is_terminal and deadline_ms is not None and now_ms >= deadline_ms


def due_events(
    execution: Execution, workflow: Workflow, now_ms: int, evaluate: Evaluate
) -> tuple[Event, ...]:
    """What is due by itself, one round; the caller folds it and asks again until it is empty.

    Steps that are `running` are left alone unless the execution is ending, when the caller has
    aborted them before.
    """
    if execution.is_terminal:
        return ()
    if is_ending(execution, now_ms):
        return _ending(execution, now_ms)
    if execution.status is Status.PENDING:
        return (ExecutionStarted(now_ms),)
    if execution.status is Status.WAITING:
        is_due = execution.wake_at_ms is not None and now_ms >= execution.wake_at_ms
        return (ExecutionResumed(now_ms),) if is_due else ()
    return _starts(execution, workflow, now_ms, evaluate) or _rest(
        execution, workflow, now_ms, evaluate
    )


def next_wake_ms(execution: Execution) -> int | None:
    """When the owner must look again although nothing reports: a retry or the deadline."""
    wakes = [step.wake_at_ms for step in execution.steps.values() if step.wake_at_ms is not None]
    if execution.created.deadline_ms is not None:
        wakes.append(execution.created.deadline_ms)
    return min(wakes, default=None)


def progress_percent(execution: Execution, workflow: Workflow | None) -> int:
    """Finished steps of all steps, 0 to 100."""
    if execution.status is Status.COMPLETED:
        return 100
    total = len(workflow.steps) if workflow is not None else 0
    return 100 * len(_done(execution)) // total if total else 0


def scope_of(execution: Execution) -> dict[str, object]:
    """The variables an expression sees; a skipped step's output is null."""
    created = execution.created
    return {
        "input": created.input,
        "steps": {
            step_id: {"output": step.output}
            for step_id, step in execution.steps.items()
            if step.status in (StepStatus.COMPLETED, StepStatus.SKIPPED)
        },
        "event": {},
        "execution": {
            "id": execution.id,
            "workflowId": created.workflow_id,
            "workflowVersion": created.workflow_version,
            "workspaceId": created.workspace,
            "userId": created.user_id,
            "metadata": created.metadata,
            "attempt": execution.attempt,
        },
    }


def _after_error(
    execution: Execution,
    workflow: Workflow,
    step: StepState,
    fact: StepErrored,
    now_ms: int,
    jitter: float,
) -> Event:
    if is_ending(execution, now_ms):
        # No try is left to an execution that ends, so none may be counted.
        is_own_fault = (
            fact.code != ErrorCode.CANCELLED and execution.status is not Status.CANCELLING
        )
        code = fact.code if is_own_fault else _cut_off_code(execution, now_ms)
        return StepFailed(now_ms, fact.step_id, fact.error, code, fact.usage)
    if fact.code in _LOSS_CODES:
        return _after_loss(execution, fact.step_id, step, fact.error, now_ms, fact.usage)
    # A step that cancels itself has failed: nobody asked for it, and it must end the execution.
    code = ErrorCode.STEP_FAILED if fact.code == ErrorCode.CANCELLED else fact.code
    if not fact.is_retryable:
        return StepFailed(now_ms, fact.step_id, fact.error, code, fact.usage)
    execution_attempt = execution.attempt
    policy = workflow.step(fact.step_id).retry
    delay_ms = None if policy is None else retry_delay_ms(policy, step.tries, jitter)
    if delay_ms is None:
        delay_ms = retry_delay_ms(execution.created.retry, execution.attempt, jitter)
        execution_attempt += 1
    if delay_ms is None:
        return StepFailed(now_ms, fact.step_id, fact.error, code, fact.usage)
    return StepRetrying(
        now_ms,
        fact.step_id,
        step.attempt + 1,
        execution_attempt,
        now_ms + max(1, delay_ms),  # never at once: each retry has its own commit
        fact.error,
        fact.usage,
    )


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


def _ending(execution: Execution, now_ms: int) -> tuple[Event, ...]:
    code = _cut_off_code(execution, now_ms)
    cut_off = tuple(
        _cut_off(step_id, code, now_ms)
        for step_id, step in execution.steps.items()
        if step.status is StepStatus.RUNNING
    )
    return (*cut_off, _end(execution, now_ms))


def _end(execution: Execution, now_ms: int) -> Event:
    if execution.status is Status.CANCELLING:
        return ExecutionCancelled(now_ms, execution.cancel_reason or "cancelled")
    for step_id, step in execution.steps.items():
        if step.status is StepStatus.FAILED and not is_overdue(execution, now_ms):
            return ExecutionFailed(now_ms, f"step {step_id}: {step.error}", ErrorCode.STEP_FAILED)
    timeout_ms = execution.created.timeout_ms
    return ExecutionFailed(now_ms, f"not done within {timeout_ms} ms", ErrorCode.TIMEOUT)


def _cut_off_code(execution: Execution, now_ms: int) -> ErrorCode:
    """Why a step under way was aborted; one whose neighbour failed is cancelled, not failed."""
    is_timeout = execution.status is not Status.CANCELLING and is_overdue(execution, now_ms)
    return ErrorCode.TIMEOUT if is_timeout else ErrorCode.CANCELLED


def _cut_off(step_id: str, code: str, now_ms: int, usage: Usage | None = None) -> StepFailed:
    return StepFailed(now_ms, step_id, "aborted", code, usage or NO_USAGE)


def _starts(
    execution: Execution, workflow: Workflow, now_ms: int, evaluate: Evaluate
) -> tuple[Event, ...]:
    scope: dict[str, object] | None = None
    events: list[Event] = []
    for step in ready_steps(workflow, _done(execution), execution.steps):
        if step.when is not None and scope is None:
            scope = scope_of(execution)
        events.extend(_start(step, now_ms, evaluate, scope or {}))
    for step_id, state in execution.steps.items():
        if state.wake_at_ms is not None and state.wake_at_ms <= now_ms:
            events.append(StepStarted(now_ms, step_id, state.attempt))
    return tuple(events)


def _start(step: Step, now_ms: int, evaluate: Evaluate, scope: Scope) -> tuple[Event, ...]:
    if step.when is None:
        return (StepStarted(now_ms, step.id, 1),)
    try:
        verdict = evaluate(step.when, scope)
    except StepFailedError as error:
        return _refused(step, f"when: {error}", now_ms)
    if not isinstance(verdict, bool):
        return _refused(step, "when: the expression must give true or false", now_ms)
    return (StepStarted(now_ms, step.id, 1) if verdict else StepSkipped(now_ms, step.id),)


def _refused(step: Step, error: str, now_ms: int) -> tuple[Event, ...]:
    return (
        StepStarted(now_ms, step.id, 1),
        StepFailed(now_ms, step.id, error, ErrorCode.STEP_FAILED),
    )


def _rest(
    execution: Execution, workflow: Workflow, now_ms: int, evaluate: Evaluate
) -> tuple[Event, ...]:
    states = execution.steps.values()
    if any(step.status is StepStatus.RUNNING for step in states):
        return ()
    if any(step.status is StepStatus.RETRYING for step in states):
        wake_at_ms = next_wake_ms(execution)
        assert wake_at_ms is not None, "a retrying step has a wake time"
        return (ExecutionParked(now_ms, wake_at_ms),)
    try:
        return (ExecutionCompleted(now_ms, _output(execution, workflow, evaluate)),)
    except StepFailedError as error:
        return (ExecutionFailed(now_ms, f"output: {error}", ErrorCode.STEP_FAILED),)


def _output(execution: Execution, workflow: Workflow, evaluate: Evaluate) -> JsonValue:
    if not workflow.has_output:
        return execution.steps[workflow.steps[-1].id].output
    scope = scope_of(execution)
    return render(workflow.output, lambda text: evaluate(text, scope))


def _done(execution: Execution) -> set[str]:
    finished = (StepStatus.COMPLETED, StepStatus.SKIPPED)
    return {step_id for step_id, step in execution.steps.items() if step.status in finished}

"""What is due by itself: starts, ends of blocks, deadlines, parking, the end of an execution.

Owns which steps start and when an execution parks or ends. Awaits nothing and reads no clock: time
and the expression evaluator come in as arguments. Invariant: the same arguments give the same
events, in an order that `evolve` accepts; naming the steps that changed (`touched`) makes a
decision cheaper and never another one.
"""

from collections.abc import Collection

from serve_app.core.blocks import (
    STARTED_MAX,
    failed_steps,
    failure_of,
    is_composite,
    live_under,
)
from serve_app.core.errors import ErrorCode, StepFailedError
from serve_app.core.execution import (
    Event,
    Execution,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionFailed,
    ExecutionParked,
    ExecutionResumed,
    ExecutionStarted,
    Status,
    StepStatus,
)
from serve_app.core.gates import Verdict
from serve_app.core.inference import JsonValue
from serve_app.core.plain_json import json_bytes
from serve_app.core.rounds import Round, cut_off
from serve_app.core.scope import Evaluate, scope_of
from serve_app.core.template import render
from serve_app.core.workflow import Workflow

RESULT_BYTES_MAX = 8 << 20  # of a step, a composite, an execution: where no other bound is given
EVENTS_MAX = 200_000  # of one journal: some 50 MB in the store; only a runaway loop has more


def is_ending(execution: Execution, now_ms: int) -> bool:
    """Whether the steps under way must be aborted because the execution ends now."""
    return (
        execution.status is Status.CANCELLING
        or is_overdue(execution, now_ms)
        or execution.failed is not None
        or _limit_reached(execution) is not None
    )


def is_overdue(execution: Execution, now_ms: int) -> bool:
    """Whether the deadline has passed before it ended."""
    deadline_ms = execution.created.deadline_ms
    return not execution.is_terminal and deadline_ms is not None and now_ms >= deadline_ms


def doomed_steps(
    execution: Execution, workflow: Workflow, now_ms: int, touched: Collection[str] | None
) -> set[str]:
    """The steps under way that must be aborted before `due_events` is asked."""
    if is_ending(execution, now_ms):
        return set(execution.live_steps)
    if touched is not None and not touched:
        return set()
    return {
        path
        for _, ended in failed_steps(execution, workflow, touched)
        for path in live_under(execution, ended)
    }


def due_events(
    execution: Execution,
    workflow: Workflow,
    now_ms: int,
    evaluate: Evaluate,
    touched: Collection[str] | None = None,
    result_bytes_max: int = RESULT_BYTES_MAX,
) -> tuple[Event, ...]:
    """What is due by itself, one round; the caller folds it and asks again until it is empty.

    Steps that are `running` are left alone unless what they stand in is ending, when the caller
    has aborted them before (`doomed_steps`). `touched` names the steps whose state changed since
    the round before; None: look at all of them.
    """
    if execution.is_terminal:
        return ()
    if is_ending(execution, now_ms):
        return _ending(execution, now_ms)
    if execution.status is Status.PENDING:
        return _first(execution, now_ms)
    if execution.status is Status.WAITING:
        is_due = execution.wake_at_ms is not None and now_ms >= execution.wake_at_ms
        return (ExecutionResumed(now_ms),) if is_due else ()
    due = Round(execution, workflow, now_ms, evaluate, result_bytes_max).events(touched)
    return due or _rest(execution, workflow, now_ms, evaluate, result_bytes_max)


def next_wake_ms(execution: Execution) -> int | None:
    """When the owner must look again although nothing reports: a retry or the deadline."""
    steps = (execution.steps[path] for path in execution.live_steps)
    wakes = [step.wake_at_ms for step in steps if step.wake_at_ms is not None]
    if execution.created.deadline_ms is not None:
        wakes.append(execution.created.deadline_ms)
    return min(wakes, default=None)


def cut_off_code(execution: Execution, now_ms: int) -> ErrorCode:
    """Why a step under way was aborted; one whose neighbour failed is cancelled, not failed."""
    is_timeout = execution.status is not Status.CANCELLING and is_overdue(execution, now_ms)
    return ErrorCode.TIMEOUT if is_timeout else ErrorCode.CANCELLED


def _first(execution: Execution, now_ms: int) -> tuple[Event, ...]:
    """What follows acceptance: a start, a result that another execution has, or a refusal."""
    refusal = execution.created.refusal
    if refusal is not None:
        return (ExecutionFailed(now_ms, refusal.message, refusal.code),)
    if execution.is_at_gate:
        return ()
    if execution.verdict is Verdict.REFUSED:
        error = "too many executions wait for the workflow's concurrency limit or cache"
        return (ExecutionFailed(now_ms, error, ErrorCode.RATE_LIMIT_EXCEEDED),)
    started = ExecutionStarted(now_ms)
    if execution.verdict is Verdict.HIT:
        return (started, ExecutionCompleted(now_ms, execution.data))
    return (started,)


def _ending(execution: Execution, now_ms: int) -> tuple[Event, ...]:
    code = cut_off_code(execution, now_ms)
    running = [
        path
        for path in execution.live_steps
        if execution.steps[path].status is not StepStatus.RETRYING
    ]
    cut = [cut_off(path, code, now_ms) for path in running]
    resumed = [ExecutionResumed(now_ms)] if execution.status is Status.WAITING and running else []
    return (*resumed, *cut, _end(execution, now_ms))


def _end(execution: Execution, now_ms: int) -> Event:
    if execution.status is Status.CANCELLING:
        return ExecutionCancelled(now_ms, execution.cancel_reason or "cancelled")
    limit = _limit_reached(execution)
    if execution.failed is not None and not is_overdue(execution, now_ms):
        step = execution.steps[execution.failed]
        error = f"step {failure_of(execution.failed, step)}"
        return ExecutionFailed(now_ms, error, ErrorCode.STEP_FAILED)
    if limit is not None and not is_overdue(execution, now_ms):
        return ExecutionFailed(now_ms, limit, ErrorCode.STEP_FAILED)
    timeout_ms = execution.created.timeout_ms
    return ExecutionFailed(now_ms, f"not done within {timeout_ms} ms", ErrorCode.TIMEOUT)


def _limit_reached(execution: Execution) -> str | None:
    """Which bound an execution has grown beyond."""
    if execution.seq >= EVENTS_MAX:
        return f"its journal has reached {EVENTS_MAX} events: split the workflow"
    if len(execution.steps) >= STARTED_MAX:
        return f"it has started {STARTED_MAX} steps, inner ones counted: split the workflow"
    return None


def _rest(
    execution: Execution,
    workflow: Workflow,
    now_ms: int,
    evaluate: Evaluate,
    result_bytes_max: int,
) -> tuple[Event, ...]:
    """Nothing starts: wait for reports, park, or end."""
    live = execution.live_steps
    if any(
        execution.steps[path].status is StepStatus.RUNNING and not is_composite(workflow, path)
        for path in live
    ):
        return ()
    if live:
        wake_at_ms = next_wake_ms(execution)
        assert wake_at_ms is not None, "a composite has a live inner step"
        return (ExecutionParked(now_ms, wake_at_ms),)
    try:
        output = _output(execution, workflow, evaluate, result_bytes_max)
        return (ExecutionCompleted(now_ms, output),)
    except StepFailedError as error:
        return (ExecutionFailed(now_ms, f"output: {error}", ErrorCode.STEP_FAILED),)


def _output(
    execution: Execution, workflow: Workflow, evaluate: Evaluate, bytes_max: int
) -> JsonValue:
    if not workflow.has_output:
        return execution.steps[workflow.steps[-1].id].output
    scope = scope_of(execution, workflow)
    output = render(workflow.output, lambda text: evaluate(text, scope))
    size = json_bytes(output)
    if size > bytes_max:
        bound = f"INFERPIPE_RESULT_MAX_BYTES allows {bytes_max}"
        raise StepFailedError(f"it takes {size} bytes; {bound}", False)  # noqa: FBT003
    return output

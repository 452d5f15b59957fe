"""Steps that wait: which signal answers which step, and what a step gives once its wait is over.

Owns the meaning of an answer. Invariant: a signal is taken by one step, once; of two steps that it
fits, the one that began to wait first takes it.
"""

from collections.abc import Iterator
from zlib import crc32

from serve_app.core.errors import StepFailedError
from serve_app.core.execution import (
    Event,
    Execution,
    Signal,
    SignalTaken,
    Status,
    StepCompleted,
    StepFailed,
    StepState,
    StepStatus,
    Wait,
    WaitKind,
)
from serve_app.core.failures import StepErrored, after_failure
from serve_app.core.inference import JsonValue
from serve_app.core.scope import Evaluate, scope_of
from serve_app.core.workflow import Workflow

SIGNALS_MAX = 100  # of one execution that no step has taken yet


def ended_waits(
    execution: Execution, workflow: Workflow, now_ms: int, evaluate: Evaluate
) -> Iterator[tuple[str, tuple[Event, ...]]]:
    """Yield the steps whose wait is over, each with what follows."""
    taken: set[int] = set()
    for path in execution.live_steps:
        state = execution.steps[path]
        if state.status is not StepStatus.WAITING or state.wait is None:
            continue
        try:
            signal = _answer(execution, workflow, path, state.wait, taken, evaluate)
        except StepFailedError as error:
            yield path, (StepFailed(now_ms, path, f"if: {error}", error.code),)
            continue
        if signal is not None:
            taken.add(signal.seq)
            taking = SignalTaken(now_ms, path, signal.seq)
            yield path, (taking, _result(execution, workflow, path, signal, now_ms))
        elif is_over(state, now_ms):
            yield path, (_result(execution, workflow, path, None, now_ms),)


def _result(
    execution: Execution, workflow: Workflow, path: str, signal: Signal | None, now_ms: int
) -> Event:
    state = execution.steps[path]
    wait = state.wait
    assert wait is not None, "it waits"
    if wait.kind is not WaitKind.CHILD:
        return StepCompleted(now_ms, path, output_of_wait(wait, signal))
    outcome = signal.data if signal is not None and isinstance(signal.data, dict) else {}
    status = outcome.get("status")
    if status == Status.COMPLETED:
        return StepCompleted(now_ms, path, outcome.get("data"))
    error = outcome.get("error") or "has not ended in time"
    text = f"{wait.message} ({wait.event}): {error}"
    # Who cancels a child wants no other in its place.
    errored = StepErrored(path, state.attempt, text, is_retryable=status != Status.CANCELLED)
    # Drawn from the child's id, so that every worker decides the same.
    jitter = crc32((wait.event or path).encode()) / 2**32
    return after_failure(execution, workflow, errored, now_ms, jitter)


def is_over(state: StepState, now_ms: int) -> bool:
    """Whether its time has come."""
    return state.wake_at_ms is not None and state.wake_at_ms <= now_ms


def output_of_wait(wait: Wait, signal: Signal | None) -> JsonValue:
    """What a waiting step gives; None: its time passed.

    An approval is given by `true` or `{"approved": true}` alone: whatever else, and silence, is
    none.
    """
    if wait.kind is WaitKind.APPROVAL:
        data = None if signal is None else signal.data
        said = data.get("approved") if isinstance(data, dict) else data
        return {"approved": said is True, "data": data}
    if wait.kind is WaitKind.EVENT and signal is not None:
        return {"name": signal.name, "data": signal.data}
    return None


def event_matches(
    execution: Execution, workflow: Workflow, path: str, event: JsonValue, evaluate: Evaluate
) -> bool:
    """Whether an event of the right name is the one a step waits for, by the step's `if`.

    Raises:
        StepFailedError: the condition has no value, or none of true and false.
    """
    condition = workflow.step(path).setting("if")
    if not isinstance(condition, str):
        return True
    verdict = evaluate(condition, {**scope_of(execution, workflow, path), "event": event})
    if isinstance(verdict, bool):
        return verdict
    raise StepFailedError("the expression must give true or false", False)  # noqa: FBT003


def _answer(
    execution: Execution,
    workflow: Workflow,
    path: str,
    wait: Wait,
    taken: set[int],
    evaluate: Evaluate,
) -> Signal | None:
    """The oldest signal that answers a step: by its id or path, or by the event's name."""
    if wait.kind is WaitKind.TIME:
        return None
    for signal in execution.signals:
        if signal.seq not in taken and _fits(execution, workflow, path, wait, signal, evaluate):
            return signal
    return None


def _fits(
    execution: Execution,
    workflow: Workflow,
    path: str,
    wait: Wait,
    signal: Signal,
    evaluate: Evaluate,
) -> bool:
    if signal.path is not None:  # an event, judged when it was delivered
        return signal.path == path
    if wait.kind is WaitKind.CHILD:
        return signal.name == wait.event
    if signal.name in (path, workflow.step(path).id):
        return True
    if wait.event != signal.name:
        return False
    event: JsonValue = {"name": signal.name, "data": signal.data}
    return event_matches(execution, workflow, path, event, evaluate)

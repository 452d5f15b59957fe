"""Who waits for an event: the steps that do, and the executions that an event may cancel.

Owns the messages between an execution and the topics it waits at, and what an event does to it.
Invariant: a subscription leaves with the commit that opens the wait and counts from that moment, by
the store's own clock; one that outlived its wait does no harm.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from serve_app.core.app_events import AppEvent, topic_partition
from serve_app.core.decisions import cancel
from serve_app.core.execution import (
    Event,
    Execution,
    ExecutionCreated,
    SignalReceived,
    StepCompleted,
    StepFailed,
    StepStatus,
    StepWaiting,
    Wait,
    WaitKind,
)
from serve_app.core.journal import Outgoing
from serve_app.core.scope import Evaluate, scope_of
from serve_app.core.triggers import holds
from serve_app.core.waits import SIGNALS_MAX, event_matches
from serve_app.core.workflow import DURATION_MS_MAX, Workflow

SUBSCRIBE_LOG, UNSUBSCRIBE_LOG = "event.sub", "event.unsub"

Decide = Callable[[Execution], tuple[Event, ...]]


@dataclass(frozen=True, slots=True)
class Subscriber:
    """A waiting step, or with an empty path an execution that may be cancelled."""

    execution_id: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.execution_id} {self.path}"


def read_subscriber(text: str) -> Subscriber:
    """The subscriber that was written so."""
    execution_id, _, path = text.partition(" ")
    return Subscriber(execution_id, path)


def at_acceptance(
    execution_id: str, created: ExecutionCreated, partition_count: int
) -> tuple[Outgoing, ...]:
    """Subscribe to what may cancel it."""
    who = Subscriber(execution_id)
    until_ms = created.deadline_ms or created.at_ms + DURATION_MS_MAX
    return tuple(
        _message(SUBSCRIBE_LOG, who, created.workspace, name, until_ms, partition_count)
        for name in created.cancel_on
    )


def at_commit(
    execution: Execution, events: Iterable[Event], partition_count: int
) -> Iterator[Outgoing]:
    """Yield what follows from the waits that these events open and close, and from the end.

    `execution` is the state after them.
    """
    workspace = execution.created.workspace
    for event in events:
        wait: Wait | None
        if isinstance(event, StepWaiting):
            log, wait = SUBSCRIBE_LOG, event.wait
        elif isinstance(event, StepCompleted | StepFailed):
            log, wait = UNSUBSCRIBE_LOG, _wait_of(execution, event.step_id)
        else:
            continue
        if wait is not None and wait.kind is WaitKind.EVENT and wait.event is not None:
            who = Subscriber(execution.id, event.step_id)
            yield _message(log, who, workspace, wait.event, wait.until_ms, partition_count)
    if execution.is_terminal:
        for name in execution.created.cancel_on:
            who = Subscriber(execution.id)
            yield _message(UNSUBSCRIBE_LOG, who, workspace, name, 0, partition_count)


def is_waiting(execution: Execution, path: str, name: str) -> bool:
    """Whether a subscription still stands for something."""
    if execution.is_terminal:
        return False
    if not path:
        return name in execution.created.cancel_on
    state = execution.steps.get(path)
    if state is None or state.status is not StepStatus.WAITING or state.wait is None:
        return False
    return state.wait.event == name


def heard(
    event: AppEvent, path: str, workflow: Workflow, now_ms: int, evaluate: Evaluate
) -> Decide:
    """What an event becomes in the journal of a subscriber; nothing where it is not meant.

    An event that comes again finds the first one, or a step that waits no longer.
    """
    shown = event.shown()

    def cancelled(execution: Execution) -> tuple[Event, ...]:
        scope = {**scope_of(execution, workflow), "event": shown}
        conditions = [one.condition for one in workflow.cancel_on if one.event == event.name]
        if not any(holds(condition, scope, evaluate) for condition in conditions):
            return ()
        return cancel(execution, f"cancelled by event {event.name} ({event.id})", now_ms)

    def answered(execution: Execution) -> tuple[Event, ...]:
        is_told = any(signal.path == path for signal in execution.signals)
        if is_told or len(execution.signals) >= SIGNALS_MAX:
            return ()
        if not event_matches(execution, workflow, path, shown, evaluate):
            return ()
        return (SignalReceived(now_ms, event.name, event.data, path),)

    def decide(execution: Execution) -> tuple[Event, ...]:
        if not is_waiting(execution, path, event.name):
            return ()
        return answered(execution) if path else cancelled(execution)

    return decide


def _wait_of(execution: Execution, path: str) -> Wait | None:
    state = execution.steps.get(path)
    return None if state is None else state.wait


def _message(
    log: str, who: Subscriber, workspace: str, name: str, until_ms: int, partition_count: int
) -> Outgoing:
    target = topic_partition(partition_count, workspace, name)
    body = json.dumps({"who": str(who), "until_ms": until_ms}).encode()
    message_id = f"{log}/{who.execution_id}/{who.path}/{name}"
    return Outgoing(message_id, target, f"{log}:{workspace}:{name}", body)

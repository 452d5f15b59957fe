"""Executions that a step starts: their ids, and the messages between parent and child.

A child lives in a partition of its own, so parent and child speak by messages: *start* leaves
with the parent's commit that begins to wait, *cancel* with the one that gives it up, *end* with the
child's last commit. Invariant: a child's id is derived from (parent, step, attempt), so whoever
starts it twice starts it once; start and cancel leave one outbox and are delivered in order.
"""

import json
from dataclasses import asdict

from serve_app.core.errors import AlreadyTerminalError
from serve_app.core.execution import (
    Event,
    Execution,
    ExecutionCreated,
    SignalReceived,
    StepFailed,
    Wait,
    WaitKind,
)
from serve_app.core.inference import JsonValue
from serve_app.core.journal import Outgoing, derived_execution_id, partition_of

DEPTH_MAX = 5  # children of children; more is a workflow that starts itself
START_LOG, END_LOG, CANCEL_LOG = "child.start", "child.end", "child.cancel"
CHILD_LOGS = frozenset({START_LOG, END_LOG, CANCEL_LOG})


def child_id(partition_count: int, parent_id: str, path: str, attempt: int) -> str:
    """The id of the child that one attempt of a step starts."""
    return derived_execution_id(partition_count, "child", parent_id, path, str(attempt))


def start(
    a_child_id: str, created: ExecutionCreated, start_at_ms: int, partition_count: int
) -> Outgoing:
    """Accept the child."""
    body: dict[str, object] = {
        "at_ms": created.at_ms,
        "start_at_ms": start_at_ms,
        "created": asdict(created),
    }
    return _message(START_LOG, a_child_id, a_child_id, body, partition_count)


def cancels(execution: Execution, events: list[Event], partition_count: int) -> list[Outgoing]:
    """Stop the children whose steps have ended without them."""
    messages = []
    for event in events:
        wait = execution.steps[event.step_id].wait if isinstance(event, StepFailed) else None
        if wait is not None and wait.kind is WaitKind.CHILD and wait.event is not None:
            body: dict[str, object] = {"at_ms": event.at_ms}
            messages.append(_message(CANCEL_LOG, wait.event, wait.event, body, partition_count))
    return messages


def end(execution: Execution, partition_count: int) -> tuple[Outgoing, ...]:
    """Tell the parent, where there is one, how its child has ended."""
    parent = execution.created.parent
    if parent is None:
        return ()
    body: dict[str, object] = {
        "at_ms": execution.completed_at_ms,
        "parent": parent,
        "status": execution.status,
        "data": execution.data,
        "error": execution.error,
    }
    return (_message(END_LOG, execution.id, parent, body, partition_count),)


def ended(
    parent: Execution, a_child_id: str, outcome: JsonValue, now_ms: int
) -> tuple[SignalReceived, ...]:
    """Take a child's end in; nothing to append where it is known, or nobody waits for it."""
    waits = (parent.steps[path].wait for path in parent.live_steps)
    is_awaited = any(wait is not None and wait.event == a_child_id for wait in waits)
    is_known = any(signal.name == a_child_id for signal in parent.signals)
    if parent.is_terminal or is_known or not is_awaited:
        return ()
    return (SignalReceived(now_ms, a_child_id, outcome),)


def wait_for(a_child_id: str, workflow_id: str, until_ms: int) -> Wait:
    """What the parent's step waits for."""
    return Wait(WaitKind.CHILD, until_ms, event=a_child_id, message=workflow_id)


def _message(
    log: str, a_child_id: str, target_id: str, body: dict[str, object], partition_count: int
) -> Outgoing:
    partition = partition_of(target_id, partition_count)
    if partition is None:
        raise AlreadyTerminalError(f"{target_id} is no execution of this cluster")
    encoded = json.dumps({"child": a_child_id, **body}, separators=(",", ":")).encode()
    # Also the id of the commit it becomes, of which a journal keeps what follows the last slash.
    return Outgoing(f"{log}.{a_child_id}", partition, log, encoded)

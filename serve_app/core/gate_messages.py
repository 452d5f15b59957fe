"""What is said to gates and rates: I want through, I have ended, I have spent.

Owns the form of the messages, which `redis_gates.lua` reads and forwards. Invariant: an execution
that has ended has sent every gate of its route its `leave`, whether it got there or not.
"""

import json
from collections.abc import Sequence

from serve_app.core.execution import Event, Execution, StepCompleted, StepFailed, StepRetrying
from serve_app.core.gates import Gate, partition_of_name
from serve_app.core.journal import Outgoing, partition_of

GATE_LOG = "gate"  # messages to gates
VERDICT_LOG = "gate.verdict"  # messages from gates to executions
_SPENDING = (StepCompleted, StepFailed, StepRetrying)  # events with the usage of an attempt
VALUE_CHARACTERS_MAX = 65_536  # of a cached result as JSON; a larger one is not kept or shared


def enter(
    execution_id: str, route: tuple[Gate, ...], priority: int, partition_count: int
) -> Outgoing:
    """Ask the first gate of a route; each sends the execution on to the next."""
    first = route[0].partition(partition_count)
    home = partition_of(execution_id, partition_count)
    message = {
        "execution": execution_id,
        "home": home,
        "priority": priority,
        "route": [_document(gate, partition_count) for gate in route],
    }
    return Outgoing(f"{execution_id}/enter/{route[0].name}", first, GATE_LOG, _encode(message))


def leave(
    execution_id: str, route: tuple[Gate, ...], result: str | None, partition_count: int
) -> tuple[Outgoing, ...]:
    """Give every place of a route back; `result` (JSON) also goes to all in line for the same."""
    messages = []
    for gate in route:
        message: dict[str, object] = {
            "execution": execution_id,
            "gate": _document(gate, partition_count),
        }
        if gate.ttl_ms is not None and result is not None and len(result) <= VALUE_CHARACTERS_MAX:
            message["value"] = result
        message_id = f"{execution_id}/leave/{gate.name}"
        target = gate.partition(partition_count)
        messages.append(Outgoing(message_id, target, GATE_LOG, _encode(message)))
    return tuple(messages)


def spent(
    execution: Execution, events: Sequence[Event], partition_count: int
) -> tuple[Outgoing, ...]:
    """Tell a rate of tokens what the events of one commit, the last of `execution`, have cost.

    With its end an execution gives back what is left of the tokens it took before it ran.
    """
    share = execution.created.tokens
    if share is None:
        return ()
    ended = (event for event in events if isinstance(event, _SPENDING))
    used = sum(event.usage.total_tokens for event in ended)
    at_ms = execution.completed_at_ms
    returned = 0 if at_ms is None else share.left_at(at_ms)
    if not used and not returned:
        return ()
    message = {
        "rate": share.name,
        "tokens": share.tokens,
        "window_ms": share.window_ms,
        "used": used - returned,
    }
    # A journal's sequence number is that of one commit alone.
    message_id = f"{execution.id}/tokens/{execution.seq}"
    target = partition_of_name(share.name, partition_count)
    return (Outgoing(message_id, target, GATE_LOG, _encode(message)),)


def _document(gate: Gate, partition_count: int) -> dict[str, object]:
    document: dict[str, object] = {
        "name": gate.name,
        "partition": gate.partition(partition_count),
        "limit": gate.limit,
        "waiting_max": gate.waiting_max,
    }
    if gate.ttl_ms is not None:
        document["ttl_ms"] = gate.ttl_ms
    return document


def _encode(message: object) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()

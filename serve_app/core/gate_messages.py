"""What is said to gates: I want through, I have ended.

Owns the form of the messages, which `redis_gates.lua` reads and forwards. Invariant: an execution
that has ended has sent every gate of its route its `leave`, whether it got there or not.
"""

import json

from serve_app.core.gates import Gate
from serve_app.core.journal import Outgoing, partition_of

GATE_LOG = "gate"  # messages to gates
VERDICT_LOG = "gate.verdict"  # messages from gates to executions
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

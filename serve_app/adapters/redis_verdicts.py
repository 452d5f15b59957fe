"""Between executions and their gates: the question that leaves with an acceptance, the answer.

Owns how an answer becomes an event. Invariant: it is committed under the sequence number it was
decided on, like anybody's append, and an answer that comes twice or too late changes nothing.
"""

import orjson

from serve_app.core.decisions import gate_answered
from serve_app.core.execution import ExecutionCreated, evolve
from serve_app.core.gate_messages import enter
from serve_app.core.gates import Verdict
from serve_app.core.journal import Commit, Committed, Conflict, Outgoing
from serve_app.ports import ExecutionStore


def entrance(
    execution_id: str, created: ExecutionCreated, partition_count: int
) -> tuple[str | bytes, ...]:
    """What an execution asks of its first gate: message id, target, body; () where it has none."""
    if not created.gates:
        return ()
    message = enter(execution_id, created.gates, created.priority, partition_count)
    return (message.message_id, f"{message.target_partition}:{message.log}", message.body)


async def take_verdict(store: ExecutionStore, outgoing: Outgoing) -> bool:
    """Append what a gate answered; False where that is known or came too late."""
    message = orjson.loads(outgoing.body)
    verdict, at_ms = Verdict(message["verdict"]), int(message["at_ms"])
    value = orjson.loads(message["value"]) if "value" in message else None
    execution = await store.load(message["execution"])
    while execution is not None:
        events = gate_answered(execution, verdict, value, at_ms)
        if not events:
            return False
        after = evolve(execution, events[0])
        match await store.commit(Commit(outgoing.message_id, None, execution, after, events)):
            case Committed():
                return True
            case Conflict(missed=missed, is_ours=False):
                for stored in missed:
                    execution = evolve(execution, stored.event)
            case _:
                return False
    return False

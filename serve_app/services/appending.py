"""Appending what anybody may: a signal, a cancel, an event that came.

Owns the race with the owner. Invariant: what is appended was decided on the state it follows.
"""

from collections.abc import Callable

from serve_app.core.execution import Event, Execution, evolve
from serve_app.core.journal import Commit, Committed, Conflict
from serve_app.ports import ExecutionStore

_TRIES_MAX = 50  # each lost race means somebody else's commit got in: it cannot go on long

Decide = Callable[[Execution], tuple[Event, ...]]


async def append(
    store: ExecutionStore, execution: Execution | None, commit_id: str, decide: Decide
) -> bool:
    """Decide, and again after each lost race; whether anything was appended.

    Args:
        store: of the execution.
        execution: as it was last seen.
        commit_id: the same for the same append, so that a lost answer appends nothing twice.
        decide: one event or none.

    Raises:
        Whatever `decide` does.
    """
    for _ in range(_TRIES_MAX):
        events = () if execution is None else decide(execution)
        if execution is None or not events:
            return False
        after = evolve(execution, events[0])
        match await store.commit(Commit(commit_id, None, execution, after, events)):
            case Committed():
                return True
            case Conflict(missed=missed, is_ours=False):
                for stored in missed:
                    execution = evolve(execution, stored.event)
            case Conflict():
                return False
            case _:
                execution = await store.load(execution.id)
    return False

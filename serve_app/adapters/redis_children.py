"""What the relay does with messages between parents and children.

Owns how each becomes an execution or an event. Invariant: all three may come twice, and late: a
child is created once by its id, an end is appended once, and what has ended is left alone.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import orjson

from serve_app.adapters.event_codec import decode_event
from serve_app.core.children import CANCEL_LOG, CHILD_LOGS, START_LOG, ended
from serve_app.core.decisions import cancel
from serve_app.core.errors import (
    AlreadyTerminalError,
    BodyTooLargeError,
    OverloadedError,
    StoreUnavailableError,
)
from serve_app.core.execution import Event, Execution, ExecutionCreated, evolve
from serve_app.core.journal import Commit, Committed, Conflict, Outgoing
from serve_app.ports import ExecutionStore


class HeldBackError(Exception):
    """A message to a child waits behind another one to it."""


Decide = Callable[[Execution], tuple[Event, ...]]


async def take_child_message(store: ExecutionStore, outgoing: Outgoing) -> bool:
    """Apply one message; False where it changed nothing.

    Raises:
        OverloadedError: the child's partition takes no more now; the message is kept.
        StoreUnavailableError: likewise.
    """
    message = orjson.loads(outgoing.body)
    child, at_ms = message["child"], message["at_ms"]
    if outgoing.log == CANCEL_LOG:
        return await _append(store, outgoing, child, lambda found: _cancelled(found, at_ms))
    if outgoing.log == START_LOG:
        created = decode_event("execution.created", orjson.dumps(message["created"]))
        assert isinstance(created, ExecutionCreated), "nothing else is sent"
        try:
            start_at_ms = message["start_at_ms"]
            return (await store.create(child, created, "create", "", start_at_ms)).is_new
        except BodyTooLargeError as error:
            message = {"parent": created.parent, "status": "failed", "error": str(error)}
    outcome = {name: message.get(name) for name in ("status", "data", "error")}
    return await _append(
        store, outgoing, message["parent"], lambda parent: ended(parent, child, outcome, at_ms)
    )


async def send_all(
    messages: Sequence[Outgoing], send: Callable[[Outgoing], Awaitable[bool]]
) -> list[bool | BaseException]:
    """What became of each, in the order given.

    All side by side but those of one child, which go one after the other until one fails: a cancel
    must follow its start. Once the store is away, no further child is tried.
    """
    side_by_side = [one for one in messages if one.log not in CHILD_LOGS]
    answers = await asyncio.gather(*map(send, side_by_side), return_exceptions=True)
    outcomes: dict[str, bool | BaseException] = {
        one.message_id: answer for one, answer in zip(side_by_side, answers, strict=True)
    }
    away: Exception | None = None
    failures: dict[str, Exception] = {}
    for one in messages:
        if one.log not in CHILD_LOGS:
            continue
        child = _child_of(one)
        failure = away or failures.get(child)
        if failure is not None:
            outcomes[one.message_id] = HeldBackError(str(failure))
            continue
        try:
            outcomes[one.message_id] = await send(one)
        except (StoreUnavailableError, OverloadedError) as error:
            outcomes[one.message_id] = away = error
        except Exception as error:  # noqa: BLE001 - it is told of, and holds up its own child alone
            outcomes[one.message_id] = failures[child] = error
    return [outcomes[one.message_id] for one in messages]


def _child_of(message: Outgoing) -> str:
    return message.message_id.rpartition(".")[2]


def _cancelled(child: Execution, now_ms: int) -> tuple[Event, ...]:
    try:
        return cancel(child, "the execution that started it went on without it", now_ms)
    except AlreadyTerminalError:
        return ()


async def _append(
    store: ExecutionStore, outgoing: Outgoing, execution_id: str, decide: Decide
) -> bool:
    execution = await store.load(execution_id)
    while execution is not None:
        events = decide(execution)
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

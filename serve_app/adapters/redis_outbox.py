"""Messages between partitions, as they stand in an outbox.

Owns their form there, and what becomes of one that cannot be applied. Invariant: what an outbox
holds is what the sender's commit left, and when.
"""

import logging
from collections.abc import Mapping, Sequence

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_children import HeldBackError
from serve_app.adapters.redis_index import partition_key
from serve_app.core.errors import OverloadedError, StoreUnavailableError
from serve_app.core.journal import Outgoing

logger = logging.getLogger(__name__)

WHY_CHARS_MAX = 500  # of why a message was given up
_NOT_NOW = (StoreUnavailableError, OverloadedError, HeldBackError)  # no fault of the message

Row = tuple[bytes, Mapping[bytes, bytes]]


def message_args(message: Outgoing) -> tuple[str | bytes, ...]:
    """A message as the functions take it."""
    target = f"{message.target_partition}:{message.log}"
    return (message.message_id, target, message.body)


def read_outgoing(row: Row) -> Outgoing:
    """The message of an entry, whose id is the time it left."""
    entry_id, members = row
    partition_text, _, log = members[b"t"].decode().partition(":")
    left_at_ms = int(entry_id.partition(b"-")[0])
    message_id = members[b"m"].decode()
    return Outgoing(message_id, int(partition_text), log, members[b"b"], left_at_ms)


async def note_faults(
    calls: RedisCalls, partition: int, rows: Sequence[Row], outcomes: Sequence[bool | BaseException]
) -> None:
    """Count the tries of messages that cannot be applied, and say which are given up."""
    for (entry_id, members), outcome in zip(rows, outcomes, strict=True):
        if not isinstance(outcome, Exception) or isinstance(outcome, _NOT_NOW):
            continue
        why = f"{type(outcome).__name__}: {outcome}"[:WHY_CHARS_MAX]
        if await calls.fcall("ip1_fault", partition_key(partition), entry_id, why):
            logger.error("given up: %s", why, extra={"message_id": members[b"m"].decode()})

"""Messages between partitions, as they stand in an outbox.

Owns their form there. Invariant: what an outbox holds is what the sender's commit left, and when.
"""

from collections.abc import Mapping

from serve_app.core.journal import Outgoing


def message_args(message: Outgoing) -> tuple[str | bytes, ...]:
    """A message as the functions take it."""
    target = f"{message.target_partition}:{message.log}"
    return (message.message_id, target, message.body)


def read_outgoing(row: tuple[bytes, Mapping[bytes, bytes]]) -> Outgoing:
    """The message of an entry, whose id is the time it left."""
    entry_id, members = row
    partition_text, _, log = members[b"t"].decode().partition(":")
    left_at_ms = int(entry_id.partition(b"-")[0])
    message_id = members[b"m"].decode()
    return Outgoing(message_id, int(partition_text), log, members[b"b"], left_at_ms)

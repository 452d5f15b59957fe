"""The values that pass between an owner, a reader and the store.

Owns ids, commits and their answers, and the notices that tell of new events. Invariant: a commit
names the sequence number and the owner token it expects, and carries an id of its own, so that the
store can answer *new*, *same*, *conflict* or *stale* and nothing is ever appended twice.
"""

import hashlib
from dataclasses import dataclass

from serve_app.core.execution import Event, Execution

EXECUTION_ID_PREFIX = "exe_"


def execution_id(partition: int, token: str) -> str:
    """An id that names its partition (two hex digits), so that no look-up is needed.

    Args:
        partition: 0 to 255.
        token: what makes it unique: letters, digits, `-` and `_`.
    """
    return f"{EXECUTION_ID_PREFIX}{partition:02x}{token}"


def derived_execution_id(partition_count: int, *parts: str) -> str:
    """The id that the same parts always give: what must be unique is derived, not looked up."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return execution_id(int(digest[:8], 16) % partition_count, digest[8:40])


def partition_for(partition_count: int, key: str) -> int:
    """The partition that the same key always gives."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % partition_count


def partition_of(an_execution_id: str, partition_count: int) -> int | None:
    """The partition an id names; None when it is not an id of this cluster."""
    return marked_partition(an_execution_id, EXECUTION_ID_PREFIX, partition_count)


def marked_partition(an_id: str, prefix: str, partition_count: int) -> int | None:
    """The partition in the two hex digits behind a prefix; None when they are not there."""
    digits = an_id.removeprefix(prefix)[:2]
    is_id = an_id.startswith(prefix) and all(c in "0123456789abcdef" for c in digits)
    if not is_id or len(digits) != 2:  # noqa: PLR2004 - the two digits of `execution_id`
        return None
    partition = int(digits, 16)
    return partition if partition < partition_count else None


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as it stands in a journal."""

    seq: int
    commit_id: str
    event: Event


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for a log in another partition; applied there once per `message_id`.

    `left_at_ms` is when it was committed, by the clock of the store; 0: it has not left yet.
    """

    message_id: str
    target_partition: int
    log: str
    body: bytes
    left_at_ms: int = 0


@dataclass(frozen=True, slots=True)
class Commit:
    """Events to append to `before`, which give `after`.

    Args:
        token: the owner's; None for an append by somebody else, which may hold only requests.
    """

    commit_id: str
    token: str | None
    before: Execution
    after: Execution
    events: tuple[Event, ...]
    outgoing: tuple[Outgoing, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """Durable. `ready_depth` is the partition's ready queue afterwards."""

    ready_depth: int


@dataclass(frozen=True, slots=True)
class Conflict:
    """Others appended first, or (`is_ours`) this very commit is in: fold and decide again."""

    missed: tuple[StoredEvent, ...]
    is_ours: bool


@dataclass(frozen=True, slots=True)
class Stale:
    """The token is not the owner's any more, or the execution is gone: stop."""


CommitAnswer = Committed | Conflict | Stale


@dataclass(frozen=True, slots=True)
class Owned:
    """An execution handed to a worker, with the token that lets it commit."""

    token: str
    execution: Execution


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a worker learns when it renews the lease of one partition.

    Args:
        next_timer_ms: when the next parked execution is due, Unix epoch; None: none is parked.
        owned_count: executions the store thinks this worker owns here.
    """

    now_ms: int
    next_timer_ms: int | None
    ready_depth: int
    owned_count: int
    outbox_length: int
    reaped_count: int
    workers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Assigned:
    """Notice: this worker owns an execution now; `execution` is None where it must be loaded."""

    execution_id: str
    token: str
    execution: Execution | None


@dataclass(frozen=True, slots=True)
class Appended:
    """Notice: events `first_seq` to `last_seq` are in; too large ones are left out of `events`."""

    execution_id: str
    first_seq: int
    last_seq: int
    events: tuple[StoredEvent, ...]


@dataclass(frozen=True, slots=True)
class ReadyRang:
    """Notice: the partition has work without an owner."""

    partition: int


@dataclass(frozen=True, slots=True)
class OutboxRang:
    """Notice: the partition's outbox has something, and this worker is asked to relay it."""

    partition: int


@dataclass(frozen=True, slots=True)
class DeliveriesDue:
    """Notice: the partition has webhook deliveries to send."""

    partition: int


@dataclass(frozen=True, slots=True)
class Resubscribed:
    """Notice: the connection was lost and is back; whatever was rung meanwhile was not heard."""


Notice = Assigned | Appended | ReadyRang | OutboxRang | DeliveriesDue | Resubscribed

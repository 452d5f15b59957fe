"""Bells on sharded pub/sub: notices for one ingress or one worker, from every partition.

Owns the channels' names and what is said on them. Invariant: bells are hints. After channels were
out of hearing a `Resubscribed` notice comes first, and whoever listens reads again.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType

import msgpack

from serve_app.adapters.event_codec import decode_event, decode_stored
from serve_app.adapters.payloads import references
from serve_app.adapters.redis_index import partition_key
from serve_app.adapters.redis_nodes import RedisNodes
from serve_app.adapters.redis_subscription import Message, RedisSubscription
from serve_app.core.execution import ExecutionCreated, new_execution
from serve_app.core.journal import (
    Appended,
    Assigned,
    DeliveriesDue,
    Notice,
    OutboxRang,
    ReadyRang,
    Resubscribed,
)
from serve_app.ports import Clock

_OF_PARTITIONS: Mapping[str, Callable[[int], Notice]] = MappingProxyType(
    {"ready": ReadyRang, "due": DeliveriesDue, "relay": OutboxRang}
)


def ingress_channels(ingress_id: str, partition_count: int) -> tuple[str, ...]:
    """Where commits tell an ingress of the executions it watches."""
    return tuple(f"{partition_key(p)}:in:{ingress_id}" for p in range(partition_count))


def worker_channels(worker_id: str, partition_count: int) -> tuple[str, ...]:
    """Where a worker hears of what it owns, and all workers of what nobody owns."""
    keys = [partition_key(p) for p in range(partition_count)]
    return (*(f"{key}:w:{worker_id}" for key in keys), *(f"{key}:bell" for key in keys))


def dispatcher_channels(partition_count: int) -> tuple[str, ...]:
    """Where every dispatcher hears of deliveries that have become due."""
    return tuple(f"{partition_key(p)}:due" for p in range(partition_count))


class RedisBells:
    """One subscription for the life of a process."""

    def __init__(self, nodes: RedisNodes, channels: Sequence[str], clock: Clock) -> None:
        self._subscription = RedisSubscription(nodes, channels, clock)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        """See `ports.Bells`."""
        async with self._subscription.listen() as messages:
            yield _notices(messages)


async def _notices(messages: AsyncIterator[Message | None]) -> AsyncIterator[Notice]:
    async for message in messages:
        yield Resubscribed() if message is None else _notice(*message)


def _notice(channel: str, data: bytes) -> Notice:
    kind, *members = msgpack.unpackb(data, raw=False)
    if kind in _OF_PARTITIONS:
        return _OF_PARTITIONS[kind](int(channel[channel.index("{") + 1 : channel.index("}")]))
    if kind == "start":
        execution_id, token, created = members
        if not created or references((created,)):
            return Assigned(execution_id, token, None)
        event = decode_event("execution.created", created)
        assert isinstance(event, ExecutionCreated), "a start carries nothing else"
        return Assigned(execution_id, token, new_execution(execution_id, event))
    execution_id, first_seq, last_seq, events = members
    if references(payload for _, payload, _ in events or ()):
        events = ()  # whoever is told reads them, payloads and all
    stored = tuple(
        decode_stored(first_seq + index, kind, payload, commit_id)
        for index, (kind, payload, commit_id) in enumerate(events or ())
    )
    return Appended(execution_id, first_seq, last_seq, stored)

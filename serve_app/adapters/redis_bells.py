"""Bells on sharded pub/sub: notices for one ingress or one worker, from every partition.

Owns the subscription and its renewal. Invariant: bells are hints. After a lost connection a
`Resubscribed` notice comes first, and whoever listens reads again.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError

from serve_app.adapters.event_codec import decode_event, decode_stored
from serve_app.adapters.redis_store import partition_key
from serve_app.core.execution import ExecutionCreated, new_execution
from serve_app.core.journal import Appended, Assigned, Notice, ReadyRang, Resubscribed
from serve_app.ports import Clock

_RETRY_DELAY_S = 0.2


def ingress_channels(ingress_id: str, partition_count: int) -> tuple[str, ...]:
    """Where commits tell an ingress of the executions it watches."""
    return tuple(f"{partition_key(p)}:in:{ingress_id}" for p in range(partition_count))


def worker_channels(worker_id: str, partition_count: int) -> tuple[str, ...]:
    """Where a worker hears of what it owns, and all workers of what nobody owns."""
    keys = [partition_key(p) for p in range(partition_count)]
    return (*(f"{key}:w:{worker_id}" for key in keys), *(f"{key}:bell" for key in keys))


class RedisBells:
    """One subscription for the life of a process."""

    def __init__(self, client: Redis, channels: Sequence[str], clock: Clock) -> None:
        self._client = client
        self._channels = channels
        self._clock = clock

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        """See `ports.Bells`."""
        pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        await pubsub.ssubscribe(*self._channels)
        try:
            yield self._notices(pubsub)
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _notices(self, pubsub: Any) -> AsyncIterator[Notice]:
        while True:
            try:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=None)
            except (RedisError, OSError, asyncio.IncompleteReadError):
                await self._clock.sleep(_RETRY_DELAY_S)
                if await self._resubscribe(pubsub):
                    yield Resubscribed()
                continue
            if message is not None and message["type"] == "smessage":
                yield _notice(message["channel"], message["data"])

    async def _resubscribe(self, pubsub: Any) -> bool:
        try:
            await pubsub.connection.disconnect()
            await pubsub.connection.connect()
        except (RedisError, OSError):
            return False
        return True


def _notice(channel: bytes, data: bytes) -> Notice:
    kind, *members = msgpack.unpackb(data, raw=False)
    if kind == "ready":
        return ReadyRang(int(channel.split(b"{")[1].split(b"}")[0]))
    if kind == "start":
        execution_id, token, created = members
        if not created:
            return Assigned(execution_id, token, None)
        event = decode_event("execution.created", created)
        assert isinstance(event, ExecutionCreated), "a start carries nothing else"
        return Assigned(execution_id, token, new_execution(execution_id, event))
    execution_id, first_seq, last_seq, events = members
    stored = tuple(
        decode_stored(first_seq + index, kind, payload, commit_id)
        for index, (kind, payload, commit_id) in enumerate(events or ())
    )
    return Appended(execution_id, first_seq, last_seq, stored)

"""EventStore: the arguments and answers of the functions in `redis_events.lua`.

Invariant: an event that the relay brings (from an `emit` step) and one that a request brings enter
their topic by the same function, under the same id.
"""

from collections.abc import AsyncIterator, Sequence

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_index import partition_key
from serve_app.adapters.store_limits import DEFAULT_LIMITS, StoreLimits
from serve_app.core.app_events import EVENT_LOG, AppEvent, event_message, topic_partition
from serve_app.core.errors import OverloadedError
from serve_app.core.journal import Outgoing
from serve_app.core.subscriptions import (
    SUBSCRIBE_LOG,
    UNSUBSCRIBE_LOG,
    Subscriber,
    read_subscriber,
)

_FULL = -1
EVENT_LOGS = frozenset({EVENT_LOG, SUBSCRIBE_LOG, UNSUBSCRIBE_LOG})
_PAGE = 500  # subscribers read at once


class RedisEvents:
    """Topics in Redis, each in the partition that workspace and name hash to."""

    def __init__(
        self, calls: RedisCalls, *, partition_count: int, limits: StoreLimits = DEFAULT_LIMITS
    ) -> None:
        self._calls = calls
        self._partition_count = partition_count
        self._kept_max = max(1, limits.events_kept_max // partition_count)
        self._retention_ms = limits.events_retention_ms

    async def publish(self, event: AppEvent, waiting_max: int) -> bool:
        """See `ports.EventStore`."""
        message = event_message(event, self._partition_count)
        answer = await self._publish(message, waiting_max)
        if answer == _FULL:
            raise OverloadedError(f"{waiting_max} messages wait already; try again later")
        return answer > 0

    async def take(self, outgoing: Outgoing) -> bool:
        """Apply one message of the relay; an accepted step's event is not refused."""
        kind = outgoing.log.partition(":")[0]
        if kind == EVENT_LOG:
            return await self._publish(outgoing) > 0
        key = partition_key(outgoing.target_partition)
        args = (outgoing.message_id, outgoing.log, outgoing.body)
        if kind == UNSUBSCRIBE_LOG:
            return bool(await self._calls.fcall("ip1_unsubscribe", key, *args))
        return bool(await self._calls.fcall("ip1_subscribe", key, *args, outgoing.left_at_ms))

    async def subscribers(
        self, workspace: str, name: str, since_max_ms: int
    ) -> AsyncIterator[Sequence[Subscriber]]:
        """See `ports.EventStore`."""
        key, cursor = self._key(workspace, name), 0
        while True:
            answer, found = await self._calls.call("HSCAN", key, cursor, "COUNT", _PAGE)
            page = [who for who, since in found.items() if int(since) <= since_max_ms]
            if page:
                yield [read_subscriber(who.decode()) for who in page]
            cursor = int(answer)
            if cursor == 0:
                return

    async def forget(self, workspace: str, name: str, who: Subscriber) -> None:
        """See `ports.EventStore`."""
        await self._calls.call("HDEL", self._key(workspace, name), str(who))

    def _key(self, workspace: str, name: str) -> str:
        partition = topic_partition(self._partition_count, workspace, name)
        return f"{partition_key(partition)}:sub:{workspace}:{name}"

    async def _publish(self, message: Outgoing, *waiting_max: int) -> int:
        key = partition_key(message.target_partition)
        args = (message.message_id, message.log, message.body, self._kept_max, self._retention_ms)
        return int(await self._calls.fcall("ip1_publish", key, *args, *waiting_max))

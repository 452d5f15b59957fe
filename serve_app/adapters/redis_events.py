"""EventStore: the arguments and answers of the functions in `redis_events.lua`.

Invariant: an event that the relay brings (from an `emit` step) and one that a request brings enter
their topic by the same function, under the same id.
"""

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_index import partition_key
from serve_app.adapters.store_limits import DEFAULT_LIMITS, StoreLimits
from serve_app.core.app_events import AppEvent, event_message
from serve_app.core.errors import OverloadedError
from serve_app.core.journal import Outgoing

_FULL = -1


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
        return await self._publish(outgoing) > 0

    async def _publish(self, message: Outgoing, *waiting_max: int) -> int:
        key = partition_key(message.target_partition)
        args = (message.message_id, message.log, message.body, self._kept_max, self._retention_ms)
        return int(await self._calls.fcall("ip1_publish", key, *args, *waiting_max))

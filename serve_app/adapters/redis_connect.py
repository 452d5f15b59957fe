"""Connections to Redis, as every process of the service opens them.

Owns time-outs and who retries: redis-py does not, because `RedisCalls` and the bells know which
calls may be sent again.
"""

from dataclasses import dataclass

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_store import DAY_MS, RedisStore
from serve_app.ports import Clock
from serve_app.settings import Settings

ANSWER_TIMEOUT_S = 5.0  # of the server; a stuck one is treated as lost


@dataclass(frozen=True, slots=True)
class RedisConnections:
    """The connections of one process; they open with their first use."""

    client: Redis
    calls: RedisCalls
    store: RedisStore

    async def close(self) -> None:
        """Finish the calls under way and disconnect."""
        await self.calls.close()
        await self.client.aclose()


def connect(settings: Settings, clock: Clock) -> RedisConnections:
    """The connections that the settings name."""
    calls = RedisCalls(_client(settings, ANSWER_TIMEOUT_S), clock)
    store = RedisStore(
        calls,
        partition_count=settings.partitions,
        backlog_max=settings.backlog_max,
        retention_ms=settings.retention_s * 1000,
        usage_kept_ms=settings.usage_retention_days * DAY_MS,
    )
    # Subscriptions wait without end for their next message, so their client has no time-out.
    return RedisConnections(_client(settings, None), calls, store)


def _client(settings: Settings, timeout_s: float | None) -> Redis:
    client: Redis = Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=timeout_s,
        socket_connect_timeout=ANSWER_TIMEOUT_S,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
    )
    return client

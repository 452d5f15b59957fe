"""Connections to Redis, as every process of the service opens them.

Owns what the settings say of the way there: addresses, user, certificates.
"""

from dataclasses import dataclass
from typing import Any

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_metrics import RedisMetrics
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_store import RedisStore
from serve_app.adapters.store_limits import DAY_MS, StoreLimits
from serve_app.ports import Clock
from serve_app.settings import Settings


@dataclass(frozen=True, slots=True)
class RedisConnections:
    """The connections of one process; they open with their first use."""

    nodes: RedisNodes
    calls: RedisCalls
    store: RedisStore

    async def close(self) -> None:
        """Finish the calls under way and disconnect."""
        await self.calls.close()


def redis_options(settings: Settings) -> RedisOptions:
    """What the settings say of the store."""
    connection: dict[str, Any] = {}
    if settings.redis_username:
        connection["username"] = settings.redis_username
    if settings.redis_password.get_secret_value():
        connection["password"] = settings.redis_password.get_secret_value()
    if settings.redis_ca_file is not None:
        connection["ssl_ca_certs"] = str(settings.redis_ca_file)
    if settings.redis_cert_file is not None and settings.redis_key_file is not None:
        connection["ssl_certfile"] = str(settings.redis_cert_file)
        connection["ssl_keyfile"] = str(settings.redis_key_file)
    urls = settings.redis_url.get_secret_value().split(",")
    return RedisOptions(
        tuple(url.strip() for url in urls), connection, ack_replicas=settings.redis_ack_replicas
    )


def connect(settings: Settings, clock: Clock) -> RedisConnections:
    """The connections that the settings name."""
    nodes = RedisNodes(redis_options(settings))
    calls = RedisCalls(nodes, clock)
    store = RedisStore(
        calls,
        partition_count=settings.partitions,
        backlog_max=settings.backlog_max,
        retention_ms=settings.retention_s * 1000,
        limits=store_limits(settings),
        usage_kept_ms=settings.usage_retention_days * DAY_MS,
    )
    return RedisConnections(nodes, calls, store)


def store_limits(settings: Settings) -> StoreLimits:
    """The store's slice of the settings."""
    return StoreLimits(
        settings.payload_inline_bytes,
        settings.input_max_bytes,
        settings.executions_kept_max,
        events_kept_max=settings.events_kept_max,
        events_retention_ms=settings.events_retention_s * 1000,
    )


def metrics_of(
    settings: Settings, stores: RedisConnections, clock: Clock, process: str
) -> RedisMetrics:
    """The page of a process's metrics, among those of the others."""
    return RedisMetrics(stores.calls, clock, process, partition_count=settings.partitions)

"""One real Valkey for the integration tests."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from serve_app.adapters.redis_bells import RedisBells, ingress_channels, worker_channels
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_store import RedisStore
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from tests.support.api import Api, running_api

PARTITIONS = 4


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for the whole session; tests keep apart by flushing."""
    data_dir: Path = tmp_path_factory.mktemp("valkey")
    with asyncio.Runner() as runner:
        server = EmbeddedValkey(data_dir, SystemClock(), SystemEntropy())
        runner.run(server.start())
        yield server.url
        runner.run(server.stop())


@dataclass
class StoreBench:
    """A store on an empty server, and the raw client beside it."""

    url: str
    store: RedisStore
    client: "Redis[bytes]"
    calls: RedisCalls

    def bells(self, worker_id: str, ingress_id: str) -> RedisBells:
        """Bells of one worker and one ingress."""
        channels = worker_channels(worker_id, PARTITIONS) + ingress_channels(ingress_id, PARTITIONS)
        return RedisBells(self.client, channels, SystemClock())


def open_store(url: str, *, backlog_max: int = 1000) -> StoreBench:
    """A store with its own connections."""
    calls = RedisCalls(Redis.from_url(url, socket_timeout=5), SystemClock())
    store = RedisStore(
        calls, partition_count=PARTITIONS, backlog_max=backlog_max, retention_ms=60_000
    )
    return StoreBench(url, store, Redis.from_url(url), calls)


@pytest.fixture
async def bench(valkey_url: str) -> AsyncIterator[StoreBench]:
    """An empty store."""
    opened = open_store(valkey_url)
    await opened.client.flushall()
    yield opened
    await opened.calls.close()
    await opened.client.aclose()


@pytest.fixture
async def api(valkey_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """The HTTP API over an empty store."""
    async with running_api(valkey_url, tmp_path) as running:
        yield running

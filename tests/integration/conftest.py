"""One real Valkey for the integration tests."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis, RedisCluster

from serve_app.adapters.redis_bells import RedisBells, ingress_channels, worker_channels
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_store import RedisStore
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from tests.support.api import Api, running_api
from tests.support.valkey_cluster import ValkeyCluster, raw_client

PARTITIONS = 4


# For a test that speaks of one server only; every other with a `store_url` runs on a cluster too.
ONE_SERVER = pytest.mark.parametrize("store_url", ["valkey_url"], indirect=True)


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for the whole session; tests keep apart by flushing."""
    with asyncio.Runner() as runner:
        data_dir = tmp_path_factory.mktemp("valkey")
        server = EmbeddedValkey(data_dir, SystemClock(), SystemEntropy())
        runner.run(server.start())
        yield server.url
        runner.run(server.stop())


@pytest.fixture(scope="session")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of three primaries for the whole session."""
    with asyncio.Runner() as runner:
        cluster = ValkeyCluster(tmp_path_factory.mktemp("cluster"))
        try:
            runner.run(cluster.start())
            yield cluster.url
        finally:
            runner.run(cluster.stop())


@pytest.fixture(scope="session", params=["valkey_url", "cluster_url"], ids=["server", "cluster"])
def store_url(request: pytest.FixtureRequest) -> str:
    """Every kind of store that the service runs on."""
    return str(request.getfixturevalue(request.param))


@dataclass
class StoreBench:
    """A store on an empty server, and the raw client beside it."""

    url: str
    store: RedisStore
    client: "Redis[bytes] | RedisCluster[bytes]"
    nodes: RedisNodes
    calls: RedisCalls

    async def keys(self, pattern: str) -> list[bytes]:
        """The keys of all servers."""
        return [key async for key in self.client.scan_iter(pattern, count=1000)]

    def bells(self, worker_id: str, ingress_id: str) -> RedisBells:
        """Bells of one worker and one ingress."""
        channels = worker_channels(worker_id, PARTITIONS) + ingress_channels(ingress_id, PARTITIONS)
        return RedisBells(self.nodes, channels, SystemClock())


def open_store(url: str, *, backlog_max: int = 1000) -> StoreBench:
    """A store with its own connections."""
    nodes = RedisNodes(RedisOptions(tuple(url.split(","))))
    calls = RedisCalls(nodes, SystemClock())
    store = RedisStore(
        calls, partition_count=PARTITIONS, backlog_max=backlog_max, retention_ms=60_000
    )
    return StoreBench(url, store, raw_client(url), nodes, calls)


@pytest.fixture
async def bench(store_url: str) -> AsyncIterator[StoreBench]:
    """An empty store."""
    opened = open_store(store_url)
    await opened.client.flushall()
    yield opened
    await opened.calls.close()
    await opened.client.aclose()


@pytest.fixture
async def api(valkey_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """The HTTP API over an empty store."""
    async with running_api(valkey_url, tmp_path) as running:
        yield running

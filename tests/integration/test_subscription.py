"""Beginning to listen while the store is not there yet, or does not know us."""

import asyncio

import pytest

from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_subscription import RedisSubscription
from serve_app.adapters.system import SystemClock
from serve_app.core.errors import StoreUnavailableError
from tests.support.tcp_proxy import TcpProxy
from tests.support.valkey_cluster import raw_client

CHANNEL = "ip:{0}:bell"


async def test_who_starts_before_its_store_waits_and_hears(valkey_url: str) -> None:
    async with TcpProxy.before(valkey_url) as proxy, raw_client(valkey_url) as client:
        proxy.is_refusing = True
        nodes = RedisNodes(RedisOptions((proxy.url(valkey_url),)))
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def listen() -> None:
            async with RedisSubscription(nodes, (CHANNEL,), SystemClock()).listen() as messages:
                heard.put_nowait(b"listening")
                async for message in messages:
                    heard.put_nowait(b"missed some" if message is None else message[1])

        listening = asyncio.ensure_future(listen())
        while proxy.refused_count < 2:  # it has tried, and tried again
            assert not listening.done()
            await asyncio.sleep(0.01)
        proxy.is_refusing = False
        assert await heard.get() == b"listening"
        await client.execute_command("SPUBLISH", CHANNEL, "ding")
        assert await heard.get() == b"ding"
        listening.cancel()
        await asyncio.wait([listening])
        await nodes.close()


async def test_who_is_not_known_is_told_at_once(valkey_url: str) -> None:
    stranger = valkey_url.replace("redis://:", "redis://:wrong-")
    nodes = RedisNodes(RedisOptions((stranger,)))
    listening = RedisSubscription(nodes, (CHANNEL,), SystemClock()).listen()
    with pytest.raises(StoreUnavailableError, match="cannot be heard"):
        await asyncio.wait_for(listening.__aenter__(), 5)
    await nodes.close()

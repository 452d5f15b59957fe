"""The pulse between workers: who is watched, from when, and what a lost one is."""

import asyncio

from serve_app.adapters.system import SystemClock
from serve_app.adapters.tcp_peers import GREETING_BYTES_MAX, TcpPeers

HOST = "127.0.0.1"


async def a_worker(name: str) -> TcpPeers:
    peers = TcpPeers(HOST, SystemClock())
    peers.worker_id = f"{HOST}:{await peers.listen()}~{name}"
    return peers


async def test_a_worker_is_watched_as_soon_as_it_has_found_the_others() -> None:
    """The newcomer knows the old one by its first heartbeat; the old one would know it later."""
    old, new = await a_worker("old"), await a_worker("new")
    watching = asyncio.ensure_future(new.is_lost(old.worker_id))
    async with asyncio.timeout(5):
        assert await old.greeted() == new.worker_id
    losing = asyncio.ensure_future(old.is_lost(new.worker_id))
    async with asyncio.timeout(5):
        assert await new.greeted() == old.worker_id
    assert not losing.done()
    watching.cancel()
    await asyncio.wait([watching])
    await new.close()
    async with asyncio.timeout(5):
        assert await losing
    await old.close()


async def test_a_greeting_in_another_s_name_is_not_heard() -> None:
    peers = await a_worker("old")
    port = int(peers.worker_id.partition("~")[0].rpartition(":")[2])
    for said in (b"10.0.0.1:80~other\n", b"x" * 2 * GREETING_BYTES_MAX, b"\xff\n", b"\n"):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
    assert peers._greeted.empty()
    await peers.close()

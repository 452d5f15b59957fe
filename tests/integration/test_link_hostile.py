"""Token links against hostile, silent and slow peers: closed, bounded, and others are served."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from serve_app.adapters.tcp_link_wire import VERSION, call_start, pack_frame, proof
from serve_app.core.errors import (
    ConnectionFailedError,
    ForbiddenError,
    InvalidPromptError,
)
from tests.support.link_pair import LINK, SECRET, Pair, request, running
from tests.support.scripted_engine import ScriptedEngine


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running(ScriptedEngine()) as pair:
        yield pair


@pytest.fixture
async def manual() -> AsyncIterator[Pair]:
    async with running(ScriptedEngine(is_manual=True)) as pair:
        yield pair


async def test_client_with_the_wrong_secret_gets_no_link() -> None:
    async with running(ScriptedEngine(), secret=b"guess") as pair:
        with pytest.raises(ConnectionFailedError):
            await pair.collect(request())
        assert pair.engine.submitted == []
        assert not pair.server.connections


async def test_replica_with_the_wrong_secret_gets_no_request(pair: Pair) -> None:
    received = asyncio.Queue[bytes]()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(pack_frame([VERSION, b"n" * 22]))
        await received.put(await reader.read(1000))
        writer.write(pack_frame([b"\0" * 32]))
        await received.put(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    grant = replace(pair.grant(), port=server.sockets[0].getsockname()[1])
    with pytest.raises(ConnectionFailedError, match="secret"):
        await anext(pair.link.generate(grant, request()))
    await received.get()
    assert await received.get() == b""
    server.close()


async def hostile(port: int, *frames: bytes) -> bytes:
    """Send bytes and return what came back until the replica closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for frame in frames:
            writer.write(frame)
            await writer.drain()
    answer = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            while data := await reader.read(65536):
                answer += data
    writer.close()
    return answer


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 10_000,
        b"\0\0\0\1\xc1",
        pack_frame([]),
        pack_frame([VERSION, b"n", b"wrong"]),
        pack_frame([VERSION + 1, b"n", b"wrong"]),
        pack_frame([[0, 1, [], []]]),
        b"\0\0\1\1" + b"x" * 257,
        b"",
    ],
)
async def test_stranger_is_closed_and_others_are_served(pair: Pair, data: bytes) -> None:
    answer = await hostile(pair.server.port, data)
    assert len(answer) < 64, "nothing but the replica's hello"
    assert not pair.server.connections
    assert pair.engine.submitted == []
    assert len(await pair.collect(request())) > 0


async def test_strangers_are_few() -> None:
    async with running(ScriptedEngine(), replace(LINK, strangers_max=3)) as pair:
        idle = [await asyncio.open_connection("127.0.0.1", pair.server.port) for _ in range(3)]
        await pair.until("len(server.connections) == 3")
        assert await hostile(pair.server.port) == b""
        for _, writer in idle:
            writer.close()
        await pair.until("not server.connections")
        await pair.collect(request())


async def raw_client(pair: Pair) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A peer that knows the secret but not our manners."""
    reader, writer = await asyncio.open_connection("127.0.0.1", pair.server.port)
    size = int.from_bytes(await reader.readexactly(4), "big")
    hello = await reader.readexactly(size)
    nonce = hello[-22:]
    writer.write(pack_frame([VERSION, b"mine", proof(SECRET, b"client", nonce, b"mine")]))
    await reader.readexactly(4 + 35)
    return reader, writer


async def test_oversized_frame_breaks_the_link_before_it_is_read() -> None:
    async with running(ScriptedEngine(), replace(LINK, frame_bytes_max=10_000)) as pair:
        reader, writer = await raw_client(pair)
        writer.write((10_001).to_bytes(4, "big"))
        assert await reader.read(100) == b""
        writer.close()
        assert not pair.server.connections


@pytest.mark.parametrize("items", [[[9, 1]], [5], [[0, 1]], [[0, 1, [], [], [], []]], [[]]])
async def test_items_of_another_layout_break_the_link(pair: Pair, items: list[object]) -> None:
    reader, writer = await raw_client(pair)
    writer.write(pack_frame(items))
    assert await reader.read(100) == b""
    writer.close()
    assert not pair.server.connections


async def test_request_over_the_frame_bound_is_refused_before_it_is_sent() -> None:
    async with running(ScriptedEngine(), replace(LINK, frame_bytes_max=10_000)) as pair:
        with pytest.raises(InvalidPromptError, match="10000 bytes"):
            await pair.collect(request(text="x" * 10_000))
        await pair.collect(request(text="x" * 9_000))
        with pytest.raises(InvalidPromptError):
            await pair.collect(request("r3", text="\ud800"))


async def test_replayed_grant_is_refused(pair: Pair) -> None:
    grant = pair.grant()
    assert [chunk async for chunk in pair.link.generate(grant, request())]
    with pytest.raises(ForbiddenError, match="used"):
        await anext(pair.link.generate(grant, request()))
    assert len(pair.engine.submitted) == 1


async def test_expired_grant_is_refused(pair: Pair) -> None:
    with pytest.raises(ConnectionFailedError, match="expired"):
        await anext(pair.link.generate(pair.grant(ttl_ms=-1), request()))
    assert pair.engine.submitted == []


async def test_forged_grant_is_refused(pair: Pair) -> None:
    forged = replace(pair.grant("r1"), expires_at_ms=2**60)
    with pytest.raises(ForbiddenError, match="signature"):
        await anext(pair.link.generate(forged, request()))


async def test_grant_of_another_request_is_refused(pair: Pair) -> None:
    with pytest.raises(ConnectionFailedError, match="another request"):
        await anext(pair.link.generate(pair.grant("r1"), request("r2")))
    assert pair.engine.submitted == []


async def test_vanished_client_aborts_all_its_streams(manual: Pair) -> None:
    _, writer = await raw_client(manual)
    starts = [call_start(n, manual.grant(f"r{n}"), request(f"r{n}")) for n in range(3)]
    writer.write(pack_frame(starts))
    await manual.until("len(engine.running) == 3")
    writer.transport.abort()
    await manual.until("len(engine.aborted) == 3")


async def test_silent_client_counts_as_broken(manual: Pair) -> None:
    _, writer = await raw_client(manual)
    writer.write(pack_frame([call_start(1, manual.grant(), request())]))
    await manual.until("engine.running")
    await manual.until("engine.aborted == ['r1']")
    writer.close()


async def test_silent_replica_counts_as_broken(pair: Pair) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(pack_frame([VERSION, b"n" * 22]))
        hello = await reader.read(1000)
        claim_start = hello.index(b"\xc4\x20") + 2
        nonce = hello[4 + 2 + 2 : claim_start - 2]
        assert hello[claim_start:] == proof(SECRET, b"client", b"n" * 22, nonce)
        writer.write(pack_frame([proof(SECRET, b"server", b"n" * 22, nonce)]))
        while await reader.read(1000):
            pass
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    grant = replace(pair.grant(), port=server.sockets[0].getsockname()[1])
    async with asyncio.timeout(3):
        with pytest.raises(ConnectionFailedError, match="silent"):
            await anext(pair.link.generate(grant, request()))
    server.close()


async def test_slow_reader_is_cut_off_within_bounds() -> None:
    bounds = replace(LINK, pending_bytes_max=200_000, write_buffer_bytes=50_000, silence_max_s=60)
    engine = ScriptedEngine(script=lambda _: ["x" * 1000] * 50_000)
    async with running(engine, bounds) as pair:
        _, writer = await raw_client(pair)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        (connection,) = pair.server.connections
        writer.write(pack_frame([call_start(1, pair.grant(), request(max_tokens=50_000))]))
        held = 0
        async with asyncio.timeout(10):
            while not connection.is_closed:
                transport = connection._transport
                assert transport is not None
                held = max(held, transport.get_write_buffer_size() + connection._pending_bytes)
                await asyncio.sleep(0)
        assert engine.aborted == ["r1"]
        assert held < 1_000_000
        assert connection.reason == "the client reads too slowly"
        writer.close()

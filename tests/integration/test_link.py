"""Token links over real loopback sockets: complete, in order, and unmoved by hostile peers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.tcp_link_server import TokenLinkServer
from serve_app.adapters.tcp_link_wire import VERSION, LinkSettings, call_start, pack_frame, proof
from serve_app.core.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidPromptError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.grants import sign_grant
from serve_app.core.inference import Chunk, FinishReason, GenerationRequest, Grant, Message, Usage
from serve_app.ports import TokenLink
from tests.support.scripted_engine import ScriptedEngine, joined

SECRET = b"the cluster's secret"
LINK = LinkSettings(hello_timeout_s=0.3, ping_interval_s=0.05, silence_max_s=0.2)


def request(request_id: str = "r1", max_tokens: int = 8, text: str = "say it") -> GenerationRequest:
    return GenerationRequest(request_id, (Message("user", text),), max_tokens=max_tokens)


@dataclass
class Pair:
    """A replica with a scripted engine and a client of it."""

    engine: ScriptedEngine
    server: TokenLinkServer
    link: TcpTokenLink

    def grant(self, request_id: str = "r1", *, ttl_ms: int = 10_000) -> Grant:
        expires_at_ms = SystemClock().now_ms() + ttl_ms
        endpoint = ("replica-1", "127.0.0.1", self.server.port)
        return sign_grant(SECRET, request_id, endpoint, expires_at_ms)

    async def collect(self, asked: GenerationRequest) -> list[Chunk]:
        return [chunk async for chunk in self.link.generate(self.grant(asked.request_id), asked)]

    async def until(self, is_met: str) -> None:
        """Wait for a condition on the pair, an expression, as tests read better so."""
        async with asyncio.timeout(5):
            while not eval(is_met, {}, {"engine": self.engine, "server": self.server}):
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(
    engine: ScriptedEngine, settings: LinkSettings = LINK, secret: bytes = SECRET
) -> AsyncIterator[Pair]:
    clock, entropy = SystemClock(), SystemEntropy()
    server = TokenLinkServer(engine, SECRET, "replica-1", clock, entropy, settings)
    await server.start()
    link = TcpTokenLink(secret, clock, entropy, settings)
    try:
        yield Pair(engine, server, link)
    finally:
        await link.close()
        await server.close()
        await engine.stop()
        await asyncio.sleep(0.01)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, "the link left tasks behind"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running(ScriptedEngine()) as pair:
        yield pair


@pytest.fixture
async def manual() -> AsyncIterator[Pair]:
    async with running(ScriptedEngine(is_manual=True)) as pair:
        yield pair


def test_client_is_a_token_link(pair: Pair) -> None:
    link: TokenLink = pair.link
    assert link


async def test_answer_arrives_complete_with_usage(pair: Pair) -> None:
    chunks = await pair.collect(request(max_tokens=5))
    assert joined(chunks) == "t0 t1 t2 t3 t4 "
    assert [token for chunk in chunks for token in chunk.token_ids] == [0, 1, 2, 3, 4]
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].usage == Usage(prompt_tokens=2, completion_tokens=5)
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


async def test_request_arrives_as_it_was_sent(pair: Pair) -> None:
    asked = replace(request(), output_schema={"enum": [1, None]}, stop=("x",), seed=3)
    await pair.collect(asked)
    assert pair.engine.submitted == [asked]


async def test_first_token_comes_before_the_second_is_made(manual: Pair) -> None:
    answer = manual.link.generate(manual.grant(), request())
    first = asyncio.ensure_future(anext(answer))
    await manual.until("engine.running")
    manual.engine.step()
    assert (await first).text == "t0 "
    await answer.aclose()


async def test_deltas_merge_while_the_consumer_is_busy(manual: Pair) -> None:
    answer = manual.link.generate(manual.grant(), request(max_tokens=50))
    first = asyncio.ensure_future(anext(answer))
    await manual.until("engine.running")
    manual.engine.step()
    await first
    for _ in range(49):
        manual.engine.step()
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    (rest,) = [chunk async for chunk in answer]
    assert rest.token_ids == tuple(range(1, 50))
    assert rest.finish_reason is FinishReason.LENGTH


async def test_two_hundred_streams_each_complete_and_in_order(pair: Pair) -> None:
    sizes = {f"r{index}": 20 + index % 30 for index in range(200)}
    answers = await asyncio.gather(*(pair.collect(request(*pair_)) for pair_ in sizes.items()))
    for (_, size), chunks in zip(sizes.items(), answers, strict=True):
        assert [token for chunk in chunks for token in chunk.token_ids] == list(range(size))
        assert joined(chunks) == "".join(f"t{index} " for index in range(size))
    assert len(pair.server.connections) == 1, "openers share one connection"


async def test_one_frame_carries_the_step_of_every_stream(manual: Pair) -> None:
    asked = [request(f"r{index}", max_tokens=1) for index in range(20)]
    answers = asyncio.gather(*(manual.collect(one) for one in asked))
    await manual.until("len(engine.running) == 20")
    (connection,) = manual.server.connections
    writes: list[int] = []
    send = connection.send
    connection.send = lambda frame: (writes.append(len(frame)), send(frame))[1]  # type: ignore[method-assign]
    manual.engine.step()
    await answers
    assert len(writes) == 1


async def test_cancelled_consumer_aborts_the_generation(manual: Pair) -> None:
    task = asyncio.ensure_future(manual.collect(request()))
    await manual.until("engine.running")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await manual.until("engine.aborted == ['r1']")
    assert not manual.engine.running
    (connection,) = manual.server.connections
    assert not connection.streams


async def test_closed_iterator_aborts_the_generation(manual: Pair) -> None:
    answer = manual.link.generate(manual.grant(), request())
    first = asyncio.ensure_future(anext(answer))
    await manual.until("engine.running")
    manual.engine.step()
    await first
    await answer.aclose()
    await manual.until("engine.aborted == ['r1']")


async def test_finished_answer_is_not_cancelled(pair: Pair) -> None:
    await pair.collect(request())
    await pair.collect(request("r2"))
    assert pair.engine.aborted == []
    (connection,) = pair.server.connections
    assert not connection.streams


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (DeadlineExceededError("late"), DeadlineExceededError),
        (InvalidPromptError("the limit is 5"), InvalidPromptError),
        (RuntimeError("a secret path"), ServeAppError),
    ],
)
async def test_engines_error_reaches_the_caller(raised: Exception, expected: type) -> None:
    async with running(ScriptedEngine(errors={"r1": (2, raised)})) as pair:
        chunks: list[Chunk] = []
        with pytest.raises(expected) as caught:
            chunks.extend([chunk async for chunk in pair.link.generate(pair.grant(), request())])
        if isinstance(raised, ServeAppError):
            assert str(caught.value) == str(raised)
        else:
            assert "secret" not in str(caught.value)


async def test_tokens_before_an_error_are_handed_out_first() -> None:
    async with running(ScriptedEngine(errors={"r1": (3, OverloadedError("full"))})) as pair:
        answer = pair.link.generate(pair.grant(), request())
        text = ""
        while len(text) < len("t0 t1 t2 "):
            text += (await anext(answer)).text
        assert text == "t0 t1 t2 "
        with pytest.raises(OverloadedError):
            await anext(answer)


async def test_engine_that_refuses_at_once_answers_with_its_error(pair: Pair) -> None:
    pair.engine.die()
    with pytest.raises(ConnectionFailedError, match="dead"):
        await pair.collect(request())


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


async def test_cut_in_mid_stream_fails_the_callers_and_frees_the_engine(manual: Pair) -> None:
    tasks = [asyncio.ensure_future(manual.collect(request(f"r{index}"))) for index in range(5)]
    await manual.until("len(engine.running) == 5")
    manual.engine.step()
    (connection,) = manual.server.connections
    connection.break_off("cut by the test")
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionFailedError] * 5
    assert sorted(manual.engine.aborted) == [f"r{index}" for index in range(5)]
    task = asyncio.ensure_future(manual.collect(request("again")))
    await manual.until("engine.running")
    for _ in range(8):
        manual.engine.step()
    assert len(joined(await task)) > 0


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


async def test_long_prefill_is_no_illness(manual: Pair) -> None:
    task = asyncio.ensure_future(manual.collect(request(max_tokens=1)))
    await asyncio.sleep(3 * LINK.silence_max_s)
    manual.engine.step()
    assert len(await task) == 1


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


async def test_reader_that_catches_up_gets_everything() -> None:
    bounds = replace(LINK, write_buffer_bytes=10_000, pending_bytes_max=8_000_000, silence_max_s=60)
    engine = ScriptedEngine(script=lambda _: ["y" * 500] * 3000)
    async with running(engine, bounds) as pair:
        answer = pair.link.generate(pair.grant(), request(max_tokens=3000))
        chunks = [await anext(answer)]
        (client,) = pair.link._connections.values()
        assert client._transport is not None
        client._transport.pause_reading()
        await pair.until("engine.finished")
        client._transport.resume_reading()
        chunks += [chunk async for chunk in answer]
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert tokens == list(range(3000))
        assert len(joined(chunks)) == 1_500_000
        assert len(chunks) < 2000, "deltas merged while the reader was behind"


async def test_streams_of_a_link_are_bounded() -> None:
    async with running(ScriptedEngine(is_manual=True), replace(LINK, streams_max=2)) as pair:
        tasks = [asyncio.ensure_future(pair.collect(request(f"r{n}", 1))) for n in range(3)]
        await pair.until("len(engine.running) == 2")
        await asyncio.sleep(0)
        pair.engine.step()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [list, list, OverloadedError]


async def test_no_replica_there_fails_at_once_and_later_succeeds(pair: Pair) -> None:
    port = pair.server.port
    await pair.server.close()
    with pytest.raises(ConnectionFailedError, match="reached"):
        await pair.collect(request())
    await pair.server.start(port=port)
    assert await pair.collect(request("r2"))


async def test_cancelled_opener_leaves_the_others_attempt_alone(pair: Pair) -> None:
    first = asyncio.ensure_future(pair.collect(request("r1")))
    second = asyncio.ensure_future(pair.collect(request("r2")))
    await asyncio.sleep(0)
    first.cancel()
    assert await second
    assert [one.request_id for one in pair.engine.submitted] == ["r2"]


async def test_closed_link_fails_its_streams_and_opens_no_more(manual: Pair) -> None:
    task = asyncio.ensure_future(manual.collect(request()))
    await manual.until("engine.running")
    await manual.link.close()
    with pytest.raises(ConnectionFailedError, match="closed"):
        await task
    with pytest.raises(ConnectionFailedError, match="closed"):
        await manual.collect(request("r2"))
    await manual.until("engine.aborted == ['r1']")


async def test_load_says_where_the_link_listens(pair: Pair) -> None:
    load = pair.server.load()
    assert (load.replica_id, load.host, load.port) == ("replica-1", "127.0.0.1", pair.server.port)

"""Token links over real loopback sockets: complete, in order, cancelled, failing at once."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from serve_app.core.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidPromptError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.inference import Chunk, FinishReason, Usage
from serve_app.ports import TokenLink
from tests.support.link_pair import LINK, Pair, request, running
from tests.support.scripted_engine import ScriptedEngine, joined


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


async def test_long_prefill_is_no_illness(manual: Pair) -> None:
    task = asyncio.ensure_future(manual.collect(request(max_tokens=1)))
    await asyncio.sleep(3 * LINK.silence_max_s)
    manual.engine.step()
    assert len(await task) == 1


async def test_reader_that_catches_up_gets_everything() -> None:
    bounds = replace(LINK, write_buffer_bytes=10_000, pending_bytes_max=8_000_000, silence_max_s=60)
    engine = ScriptedEngine(script=lambda _: ["y" * 500] * 3000)
    async with running(engine, bounds) as pair:
        answer = pair.link.generate(pair.grant(), request(max_tokens=3000))
        chunks = [await anext(answer)]
        (client,) = pair.link._links._open.values()
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

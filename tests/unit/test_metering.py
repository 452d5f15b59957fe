"""What a replica measures and tells: waiting prompts, pace, news once, waste."""

from serve_app.core.errors import ConnectionFailedError
from serve_app.core.inference import (
    SESSION_KEY_MAX,
    Chunk,
    FinishReason,
    GenerationRequest,
    Message,
    Usage,
)
from serve_app.core.prefix import BLOCK_TOKENS
from serve_app.services.metering import NEWS_MAX, MeteredEngine
from tests.support.scripted_engine import ScriptedEngine
from tests.support.virtual_time import VirtualClock, virtual_time


def a_request(request_id: str = "r1", chars: int = 400, max_tokens: int = 3) -> GenerationRequest:
    text = (Message("user", "x" * chars),)
    return GenerationRequest(
        request_id, text, max_tokens=max_tokens, tenant="acme", session="s1", model="m"
    )


def a_meter(engine: ScriptedEngine) -> MeteredEngine:
    return MeteredEngine(engine, VirtualClock(), region="eu", stake="1.5")


@virtual_time
async def test_a_prompt_waits_until_its_first_token() -> None:
    engine = ScriptedEngine(is_manual=True)
    meter = a_meter(engine)
    seen: list[Chunk | Exception] = []
    meter.submit(a_request(), seen.append)
    assert meter.load().prefill_tokens == 101
    assert meter.take_news().arrived == ("r1",)
    engine.step()
    load = meter.load()
    assert (load.prefill_tokens, load.region, load.stake) == (0, "eu", "1.5")
    [begun] = meter.take_news().begun
    assert (begun.request_id, begun.session, len(begun.prefix)) == ("r1", "acme/s1", 1)
    assert len(seen) == 1


@virtual_time
async def test_pace_and_steps_are_measured() -> None:
    clock = VirtualClock()
    engine = ScriptedEngine(is_manual=True)
    meter = MeteredEngine(engine, clock)
    meter.submit(a_request(), lambda _: None)
    await clock.sleep(0.202)
    engine.step()
    assert meter.load().ttft_ms == 202
    assert meter.load().prefill_ms == 2.0  # 101 tokens
    for _ in range(2):
        await clock.sleep(0.03)
        engine.step()
    assert round(meter.load().step_ms) == 30


@virtual_time
async def test_each_piece_of_news_is_told_once_and_blocks_only_while_new() -> None:
    engine = ScriptedEngine(is_manual=True)
    meter = a_meter(engine)
    for request_id in ("r1", "r2"):
        meter.submit(a_request(request_id), lambda _: None)
    engine.step()
    assert meter.has_news
    first, second = meter.take_news().begun
    assert (len(first.prefix), second.prefix) == (1, ())
    assert meter.take_news().begun == ()
    assert not meter.has_news
    engine.step()
    engine.step()
    assert [one.tenant for one in meter.take_news().ended] == ["acme", "acme"]


@virtual_time
async def test_what_is_cached_does_not_wait_to_be_computed() -> None:
    engine = ScriptedEngine(is_manual=True)
    meter = a_meter(engine)
    meter.submit(a_request("r1"), lambda _: None)
    engine.step()
    meter.submit(a_request("r2"), lambda _: None)
    assert meter.load().prefill_tokens == 101 - BLOCK_TOKENS
    engine.step()
    assert meter.load().prefill_tokens == 0


@virtual_time
async def test_news_is_bounded() -> None:
    engine = ScriptedEngine(is_manual=True)
    meter = a_meter(engine)
    for number in range(NEWS_MAX + 1):
        meter.submit(a_request(str(number), max_tokens=1), lambda _: None)
    engine.step()
    news = meter.take_news()
    assert len(news.arrived) == len(news.begun) == len(news.ended) == NEWS_MAX


@virtual_time
async def test_an_aborted_answer_is_waste_and_leaves_nothing_waiting() -> None:
    engine = ScriptedEngine(is_manual=True)
    meter = a_meter(engine)
    meter.submit(a_request("unborn"), lambda _: None)
    meter.submit(a_request("young"), lambda _: None)
    meter.abort("unborn")
    engine.step()
    meter.abort("young")
    load = meter.load()
    assert (load.prefill_tokens, load.aborted_count, load.wasted_tokens) == (0, 2, 1)
    assert [one.request_id for one in meter.take_news().ended] == ["unborn", "young"]


@virtual_time
async def test_an_engine_that_dies_or_refuses_leaves_nothing_waiting() -> None:
    engine = ScriptedEngine(is_manual=True)
    meter = a_meter(engine)
    seen: list[Chunk | Exception] = []
    meter.submit(a_request("r1"), seen.append)
    engine.die()
    assert isinstance(seen[0], ConnectionFailedError)
    try:
        meter.submit(a_request("r2"), seen.append)
    except ConnectionFailedError:
        assert meter.load().prefill_tokens == 0
    assert meter.load().prefill_tokens == 0


@virtual_time
async def test_usage_is_the_engines_own() -> None:
    class OneChunk(ScriptedEngine):
        def submit(self, request, emit) -> None:  # type: ignore[no-untyped-def]
            emit(Chunk("x", (1,), FinishReason.STOP, Usage(90, 1, 64)))

    meter = a_meter(OneChunk())
    meter.submit(a_request(), lambda _: None)
    news = meter.take_news()
    assert (news.begun[0].prompt_tokens, news.begun[0].cached_tokens) == (90, 64)
    assert (news.ended[0].prompt_tokens, news.ended[0].completion_tokens) == (90, 1)


def test_sessions_of_two_tenants_are_two_and_names_are_bounded() -> None:
    mine = a_request()
    assert mine.session_key == "acme/s1"
    assert GenerationRequest("r", (), session="s1", tenant="other").session_key == "other/s1"
    assert GenerationRequest("r", (), tenant="acme").session_key == ""
    assert len(GenerationRequest("r", (), session="x" * 10_000).session_key) == SESSION_KEY_MAX

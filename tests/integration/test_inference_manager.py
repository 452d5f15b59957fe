"""`InferenceManager` against the real application: streams, retries, sessions, and its page."""

import ast
import asyncio
import gc
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import inferpipe._http
from inferpipe import (
    AsyncInferPipe,
    ConnectionFailedError,
    InferenceConfig,
    InferenceError,
    InferenceManager,
    InferenceTimeoutError,
    InvalidArgumentError,
    InvalidPromptError,
    ModelNotAvailableError,
    NoHostsAvailableError,
    RateLimitExceededError,
    UnknownSessionError,
)
from serve_app.core import errors
from serve_app.core.inference import ReplicaLoad
from serve_app.core.routing import ReplicaReport
from serve_app.ingress.app import Services
from tests.support.api import ADMIN_KEY
from tests.support.scripted_engine import ScriptedEngine
from tests.support.sockets import Stage, staged
from tests.support.tcp_proxy import TcpProxy

PAGE = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


async def report(services: Services, host: str = "h1") -> None:
    load = ReplicaLoad(host, ("scripted",), "127.0.0.1", 1)
    now_ms = services.clock.now_ms()
    await services.hosts._registry.announce(ReplicaReport(load, "ready", "", now_ms))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between tries, as they were asked for; they take no time."""
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(inferpipe._http, "async_sleep", sleep)
    return asked


@pytest.fixture
async def stage(valkey_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with staged(valkey_url, tmp_path, ScriptedEngine()) as stage:
        yield stage


@pytest.fixture
async def manual(valkey_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with staged(valkey_url, tmp_path, ScriptedEngine(is_manual=True)) as stage:
        yield stage


def client_of(stage: Stage, key: str = ADMIN_KEY, port: int = 0) -> AsyncInferPipe:
    return AsyncInferPipe(key, base_url=f"http://127.0.0.1:{port or stage.port}", retries=0)


@asynccontextmanager
async def managing(
    stage: Stage, key: str = ADMIN_KEY, port: int = 0, **config: object
) -> AsyncIterator[tuple[AsyncInferPipe, InferenceManager]]:
    async with client_of(stage, key, port) as client:
        settings = InferenceConfig(**config)  # type: ignore[arg-type]
        async with InferenceManager(client, settings) as manager:
            yield client, manager


async def text_of(stream: AsyncIterator[str]) -> str:
    return "".join([token async for token in stream])


async def test_a_stream_has_text_usage_and_reason(stage: Stage) -> None:
    async with managing(stage) as (_, manager):
        stream = manager.stream_inference(
            "one two", model="scripted", max_tokens=3, stop_sequences=["x"], top_p=0.5
        )
        assert await text_of(stream) == "t0 t1 t2 "
        assert stream.finish_reason == "length"
        assert stream.usage is not None
        assert stream.usage.total_tokens == 5
    asked = stage.engine.submitted[0]
    assert (asked.model, asked.stop, asked.top_p) == ("scripted", ("x",), 0.5)


async def test_answers_share_one_socket_and_compression_is_a_setting(stage: Stage) -> None:
    config = {"compression_enabled": False, "default_model": "scripted"}
    async with managing(stage, **config) as (_, manager):  # type: ignore[arg-type]
        answers = await asyncio.gather(
            *(text_of(manager.stream_inference("x", max_tokens=n)) for n in range(1, 20))
        )
        assert [len(answer.split()) for answer in answers] == list(range(1, 20))
        assert len(stage.api.services.sockets) == 1
        socket = next(iter(manager._sockets.values()))
        assert socket._connection is not None
        assert socket._connection.protocol.extensions == []
    assert {asked.model for asked in stage.engine.submitted} == {"scripted"}


@pytest.mark.parametrize("way", ["aclose", "with", "dropped", "cancelled"])
async def test_leaving_a_stream_cancels_the_answer_and_keeps_the_socket(
    manual: Stage, way: str
) -> None:
    async with managing(manual) as (_, manager):
        stream = manager.stream_inference("x")
        first = asyncio.ensure_future(anext(stream))
        await manual.until("engine.running")
        if way == "cancelled":
            first.cancel()
        else:
            manual.engine.step()
            assert await first == "t0 "
        if way == "aclose":
            await stream.aclose()
        if way == "with":
            async with stream:
                pass
        del stream, first
        if way == "cancelled":
            gc.collect()  # a cancelled task's traceback keeps the stream alive in a cycle
        await manual.until("engine.aborted")
        assert len(manual.api.services.sockets) == 1


@pytest.mark.parametrize(
    ("error", "expected", "tries"),
    [
        (errors.NoHostsAvailableError("none"), NoHostsAvailableError, 4),
        (errors.ConnectionFailedError("lost"), ConnectionFailedError, 4),
        (errors.ModelNotAvailableError("no"), ModelNotAvailableError, 1),
        (errors.InvalidPromptError("long"), InvalidPromptError, 1),
        (errors.DeadlineExceededError("late"), InferenceTimeoutError, 1),
        (errors.RateLimitExceededError("much"), RateLimitExceededError, 1),
        (errors.StoreUnavailableError("away"), InferenceError, 1),
    ],
)
async def test_each_code_has_its_class_and_only_lost_hosts_are_tried_again(
    stage: Stage,
    short_pauses: list[float],
    error: Exception,
    expected: type[InferenceError],
    tries: int,
) -> None:
    stage.router.error = error
    async with managing(stage) as (_, manager):
        with pytest.raises(InferenceError) as raised:
            await text_of(manager.stream_inference("x"))
    assert type(raised.value) is expected
    assert len(stage.router.admitted) == tries
    assert len(short_pauses) == tries - 1
    assert short_pauses == sorted(short_pauses)


async def test_a_wrong_key_is_told_apart_from_a_lost_host(stage: Stage) -> None:
    async with managing(stage, "ip_nobody-knows-this") as (_, manager):
        with pytest.raises(InferenceError) as raised:
            await text_of(manager.stream_inference("x"))
    assert raised.value.code == "UNAUTHORIZED"


async def test_a_host_that_cannot_be_reached_is_tried_again(
    stage: Stage, short_pauses: list[float]
) -> None:
    async with managing(stage, port=1, max_retries=2) as (_, manager):
        with pytest.raises(ConnectionFailedError):
            await text_of(manager.stream_inference("x"))
        with pytest.raises(ConnectionFailedError):
            await manager.connect_to_host("ws://127.0.0.1:1")
    assert len(short_pauses) == 4


async def test_a_lost_connection_is_made_again_before_the_first_token_and_not_after(
    manual: Stage,
) -> None:
    async with (
        TcpProxy("127.0.0.1", manual.port) as proxy,
        client_of(manual, port=proxy.port) as client,
        InferenceManager(client) as manager,
    ):
        stream = manager.stream_inference("x", max_tokens=2)
        first = asyncio.ensure_future(anext(stream))
        await manual.until("engine.running")
        proxy.cut()
        await manual.until("len(engine.submitted) == 2 and len(engine.aborted) == 1")
        manual.engine.step()
        assert await first == "t0 "
        proxy.cut()
        with pytest.raises(ConnectionFailedError):
            await anext(stream)
        assert len(manual.engine.submitted) == 2


async def test_a_turn_that_may_have_been_heard_is_not_sent_again(manual: Stage) -> None:
    async with (
        TcpProxy("127.0.0.1", manual.port) as proxy,
        client_of(manual, port=proxy.port) as client,
        InferenceManager(client) as manager,
    ):
        session = await client.sessions.create("scripted")
        stream = manager.session_inference(session.id, "x")
        first = asyncio.ensure_future(anext(stream))
        await manual.until("engine.running")
        proxy.cut()
        with pytest.raises(ConnectionFailedError):
            await first
        assert len(manual.engine.submitted) == 1


async def test_a_slow_reader_gets_merged_pieces_and_holds_nobody_up(stage: Stage) -> None:
    async with managing(stage, stream_buffer_size=2) as (_, manager):
        slow = manager.stream_inference("x", max_tokens=500)
        pieces = [await anext(slow)]
        for _ in range(5):
            await text_of(manager.stream_inference("y", max_tokens=100))
        await stage.until("len(engine.finished) == 6")
        pieces += [piece async for piece in slow]
    assert "".join(pieces).split() == [f"t{n}" for n in range(500)]
    assert len(pieces) <= 5


async def test_a_session_and_its_end(stage: Stage) -> None:
    async with managing(stage) as (client, manager):
        session = await client.sessions.create("scripted", system="be brief")
        for prompt in ("one", "two"):
            await text_of(manager.session_inference(session.id, prompt, max_tokens=1))
        said = [(m.role, m.content) async for m in client.sessions.messages(session.id)]
        assert said == [
            ("system", "be brief"), ("user", "one"), ("assistant", "t0 "),
            ("user", "two"), ("assistant", "t0 "),
        ]  # fmt: skip
        assert (await client.sessions.get(session.id)).message_count == 5
        await client.sessions.end(session.id)
        with pytest.raises(UnknownSessionError):
            await text_of(manager.session_inference(session.id, "three"))


async def test_hosts_by_id_by_address_and_by_choice(stage: Stage) -> None:
    await report(stage.api.services)
    async with managing(stage) as (_, manager):
        host = await manager.select_best_host("scripted", max_latency=10_000, region="eu")
        for options in ({"host_address": host.id}, {"host_address": host.api_url + "/v1/ws"}):
            await text_of(manager.stream_inference("x", max_tokens=1, **options))  # type: ignore[arg-type]
        await text_of(manager.direct_inference("x", host.api_url + "/v1/ws", max_tokens=1))
    assert {asked.placement.host for asked in stage.router.admitted} == {"h1"}


async def test_what_cannot_be_sent_is_said_at_once(stage: Stage) -> None:
    async with client_of(stage) as client:
        manager = InferenceManager(client)
        with pytest.raises(InvalidPromptError):
            manager.stream_inference("  ")
        for options in ({"max_tokens": 0}, {"temperature": 3}, {"max_token": 1}):
            with pytest.raises(InvalidArgumentError):
                manager.stream_inference("x", **options)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError):
            await manager.select_best_host()
        for url in ("", "localhost", "ftp://x", "ws://"):
            with pytest.raises(InvalidArgumentError):
                manager.direct_inference("x", url)
        for settings in ({"max_retries": -1}, {"connection_timeout": 0}, {"stream_buffer_size": 0}):
            with pytest.raises(InvalidArgumentError):
                replace(InferenceConfig(), **settings)


async def test_the_page_runs_as_it_stands(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await report(stage.api.services)
    monkeypatch.setenv("INFERPIPE_API_KEY", ADMIN_KEY)
    monkeypatch.setenv("INFERPIPE_BASE_URL", f"http://127.0.0.1:{stage.port}")
    names: dict[str, object] = {}
    for example in EXAMPLES:
        code = compile(example, "inference.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running = eval(code, names)
        if running is not None:
            await running
    printed = capsys.readouterr().out
    assert printed.count("t0 ") >= 4
    assert "UNKNOWN_SESSION" in printed
    assert names["answers"] == ["".join(f"t{n} " for n in range(8))] * 3
    assert len(names["said"]) == 5  # type: ignore[arg-type]

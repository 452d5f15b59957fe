"""The WebSocket protocol over real sockets: every message, every refusal, every way to leave."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from inferpipe.wire import ServerMessage
from serve_app.core.errors import (
    ConnectionFailedError,
    InvalidPromptError,
    ModelNotAvailableError,
    NoHostsAvailableError,
    OverloadedError,
)
from serve_app.core.inference import (
    Chunk,
    FinishReason,
    GenerationRequest,
    Placement,
    Resumed,
    Usage,
)
from tests.support.api import ADMIN_KEY
from tests.support.scripted_engine import ScriptedEngine
from tests.support.sockets import Stage, staged, text_of

ANSWERS: TypeAdapter[ServerMessage] = TypeAdapter(ServerMessage)


def code_of(message: dict[str, object]) -> object:
    assert message["type"] == "error"
    return message["error"]["code"]  # type: ignore[index]


@pytest.fixture
async def stage(valkey_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with staged(valkey_url, tmp_path, ScriptedEngine()) as stage:
        yield stage


@pytest.fixture
async def manual(valkey_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    """The engine makes a step only when a test says so."""
    async with staged(valkey_url, tmp_path, ScriptedEngine(is_manual=True)) as stage:
        yield stage


async def test_an_answer_is_chunks_and_an_end_with_usage(stage: Stage) -> None:
    async with stage.socket() as talk:
        await talk.ask("one two", max_tokens=3, temperature=0, model="scripted")
        said = await talk.to_end()
    assert text_of(said) == "t0 t1 t2 "
    assert [m.get("finish_reason") for m in said[:-1]] == [*[None] * (len(said) - 2), "length"]
    assert said[-1] == {
        "type": "stream_end",
        "finish_reason": "length",
        "usage": {
            "prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "cached_tokens": 0,
        },
    }  # fmt: skip
    for message in said:
        ANSWERS.validate_python(message)
    assert stage.engine.submitted[0].messages[0].content == "one two"
    assert stage.engine.submitted[0].deadline_ms is not None


async def test_an_answer_that_is_not_streamed_is_one_chunk(stage: Stage) -> None:
    async with stage.socket() as talk:
        await talk.ask(max_tokens=4, stream=False)
        said = await talk.to_end()
    assert [m["type"] for m in said] == ["stream_chunk", "stream_end"]
    assert (said[0]["content"], said[0]["finish_reason"]) == ("t0 t1 t2 t3 ", "length")


async def test_many_requests_share_a_socket_and_every_message_names_its_own(stage: Stage) -> None:
    ids = [f"r{index}" for index in range(20)]
    texts = dict.fromkeys(ids, "")
    async with stage.socket() as talk:
        for index, request_id in enumerate(ids):
            await talk.ask(request_id=request_id, max_tokens=index + 1)
        ended: set[str] = set()
        while len(ended) < len(ids):
            message = await talk.next()
            request_id = str(message["request_id"])
            assert request_id not in ended
            if message["type"] == "stream_end":
                ended.add(request_id)
            else:
                texts[request_id] += str(message["content"])
    assert texts == {
        request_id: "".join(f"t{n} " for n in range(index + 1))
        for index, request_id in enumerate(ids)
    }


async def test_without_a_request_id_there_is_one_request_at_a_time(manual: Stage) -> None:
    async with manual.socket() as talk:
        await talk.ask()
        await talk.ask()
        refusal = await talk.next()
        assert code_of(refusal) == "INVALID_REQUEST"
        await manual.until("engine.running")
        while manual.engine.running:
            manual.engine.step()
        assert text_of(await talk.to_end()).startswith("t0 ")
        await talk.ask(max_tokens=1)  # and then the next
        await manual.until("engine.running")
        manual.engine.step()
        assert text_of(await talk.to_end()) == "t0 "


async def test_a_request_id_in_use_is_refused(manual: Stage) -> None:
    async with manual.socket() as talk:
        await talk.ask(request_id="a")
        await talk.ask(request_id="a")
        refusal = await talk.next()
        assert refusal["request_id"] == "a"
        assert code_of(refusal) == "INVALID_REQUEST"


async def test_a_cancel_ends_the_request_with_the_usage_so_far_down_to_the_engine(
    manual: Stage,
) -> None:
    async with manual.socket() as talk:
        await talk.ask(request_id="a", max_tokens=100)
        await talk.ask(request_id="b", max_tokens=2)
        await manual.until("len(engine.running) == 2")
        manual.engine.step()
        assert {(await talk.next())["request_id"] for _ in range(2)} == {"a", "b"}
        await talk.send({"type": "cancel", "request_id": "a"})
        await talk.send({"type": "cancel", "request_id": "a"})
        await talk.send({"type": "cancel", "request_id": "nobody's"})
        end = await talk.next()
        assert (end["type"], end["request_id"]) == ("stream_end", "a")
        assert end["finish_reason"] == "cancelled"
        assert end["usage"]["completion_tokens"] == 1  # type: ignore[index]
        await manual.until("engine.aborted")
        manual.engine.step()
        assert [m["request_id"] for m in await talk.to_end()] == ["b", "b"]


async def test_a_cancel_right_behind_its_request_is_answered(stage: Stage) -> None:
    async with stage.socket() as talk:
        for index in range(20):
            ask = {"type": "inference", "request_id": f"r{index}", "request": {"prompt": "x"}}
            await talk.send(ask)
            await talk.send({"type": "cancel", "request_id": f"r{index}"})
            assert (await talk.to_end())[-1]["type"] == "stream_end"


async def test_leaving_aborts_all_generations_of_the_socket(manual: Stage) -> None:
    async with manual.socket() as talk:
        for request_id in "abc":
            await talk.ask(request_id=request_id)
        await manual.until("len(engine.running) == 3")
    await manual.until("len(engine.aborted) == 3")


async def test_a_dropped_connection_aborts_like_a_close(manual: Stage) -> None:
    async with manual.socket() as talk:
        await talk.ask()
        await manual.until("engine.running")
        talk.connection.transport.abort()
        await manual.until("engine.aborted")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoHostsAvailableError("none"), "NO_HOSTS_AVAILABLE"),
        (OverloadedError("full"), "NO_HOSTS_AVAILABLE"),
        (ConnectionFailedError("lost"), "CONNECTION_FAILED"),
        (ModelNotAvailableError("no such model"), "MODEL_NOT_AVAILABLE"),
        (InvalidPromptError("too long"), "INVALID_PROMPT"),
        (RuntimeError("a defect"), "INTERNAL"),
    ],
)
async def test_what_the_plane_says_has_a_code(stage: Stage, error: Exception, code: str) -> None:
    stage.router.error = error
    async with stage.socket() as talk:
        await talk.ask(request_id="a")
        refusal = await talk.next()
        stage.router.error = None
        await talk.ask(request_id="b")
        assert (await talk.to_end())[-1]["type"] == "stream_end"
    ANSWERS.validate_python(refusal)
    assert (refusal["type"], refusal["request_id"]) == ("error", "a")
    assert code_of(refusal) == code
    assert "a defect" not in json.dumps(refusal)


async def test_an_answer_that_breaks_off_says_so_in_its_last_chunk(manual: Stage) -> None:
    async with manual.socket() as talk:
        await talk.ask(request_id="a")
        await manual.until("engine.running")
        manual.engine.step()
        await talk.next()
        manual.engine.die()
        said = await talk.to_end()
    assert (said[0]["content"], said[0]["finish_reason"]) == ("", "error")
    assert code_of(said[1]) == "CONNECTION_FAILED"
    assert said[1]["usage"]["completion_tokens"] == 1  # type: ignore[index]


async def test_a_timeout_ends_the_request_and_its_generation(manual: Stage) -> None:
    async with manual.socket() as talk:
        await talk.ask(timeout=50)
        assert code_of(await talk.next()) == "INFERENCE_TIMEOUT"
        await manual.until("not engine.running")


async def test_a_prompt_that_says_nothing_is_refused(stage: Stage) -> None:
    async with stage.socket() as talk:
        for prompt in ("", "   \n", None, 7, ["x"], {"text": "x"}):
            await talk.ask(prompt, request_id="a")
            refusal = await talk.next()
            assert code_of(refusal) == "INVALID_PROMPT", prompt
            assert refusal["request_id"] == "a"
        await talk.send({"type": "inference", "request": {}})
        assert code_of(await talk.next()) == "INVALID_PROMPT"
    assert stage.engine.submitted == []


NO_MESSAGES = [
    "", "no json", "[]", "null", "7", '"inference"', "{}", '{"type": 7}', '{"type": "other"}',
    '{"type": "inference"}', '{"type": "inference", "request": []}',
    '{"type": "inference", "request": {"prompt": "x", "max_tokens": 0}}',
    '{"type": "inference", "request": {"prompt": "x", "max_tokens": "many"}}',
    '{"type": "inference", "request": {"prompt": "x", "temperature": NaN}}',
    '{"type": "inference", "request": {"prompt": "x", "temperature": 2.1}}',
    '{"type": "inference", "request": {"prompt": "x", "top_p": 0}}',
    '{"type": "inference", "request": {"prompt": "x", "stream": "yes"}}',
    '{"type": "inference", "request": {"prompt": "x", "timeout": 0}}',
    '{"type": "inference", "request": {"prompt": "x", "stop": [""]}}',
    '{"type": "inference", "request": {"prompt": "x", "max_token": 3}}',
    '{"type": "inference", "request_id": "", "request": {"prompt": "x"}}',
    '{"type": "inference", "request_id": 7, "request": {"prompt": "x"}}',
    '{"type": "inference", "request": {"prompt": "\\ud800"}}',
    '{"type": "cancel", "request_id": "a", "why": "because"}',
    '{"type": "auth"}',
    "[" * 200 + "]" * 200,
]  # fmt: skip


async def test_a_message_of_no_kind_is_refused_and_the_socket_goes_on(stage: Stage) -> None:
    async with stage.socket() as talk:
        for message in NO_MESSAGES:
            await talk.send(message)
            assert code_of(await talk.next()) == "INVALID_REQUEST", message
        await talk.ask()
        assert (await talk.to_end())[-1]["type"] == "stream_end"
    assert len(stage.engine.submitted) == 1


async def test_a_binary_frame_is_refused(stage: Stage) -> None:
    async with stage.socket() as talk:
        await talk.connection.send(b'{"type": "inference", "request": {"prompt": "x"}}')
        assert code_of(await talk.next()) == "INVALID_REQUEST"


async def test_the_size_of_a_message_is_bounded(valkey_url: str, tmp_path: Path) -> None:
    ask = '{"type": "inference", "request": {"prompt": "%s"}}'
    async with (
        staged(valkey_url, tmp_path, ScriptedEngine(), socket_message_bytes_max=2000) as stage,
        stage.socket() as talk,
    ):
        await talk.send(ask % ("x" * (2000 - len(ask) + 2)))
        assert (await talk.to_end())[-1]["type"] == "stream_end"
        await talk.send(ask % ("x" * (2001 - len(ask) + 2)))
        assert code_of(await talk.next()) == "INVALID_PROMPT"
        await talk.send('{"type": "cancel"%s}' % (" " * 2000))
        assert code_of(await talk.next()) == "INVALID_REQUEST"
        assert (await talk.closed())[0] == 1009


async def test_requests_of_one_socket_are_bounded(valkey_url: str, tmp_path: Path) -> None:
    engine = ScriptedEngine(is_manual=True)
    async with (
        staged(valkey_url, tmp_path, engine, socket_requests_max=2) as stage,
        stage.socket() as talk,
    ):
        for request_id in "abc":
            await talk.ask(request_id=request_id, max_tokens=1)
        refusal = await talk.next()
        assert code_of(refusal) == "RATE_LIMIT_EXCEEDED"
        assert refusal["request_id"] == "c"
        await stage.until("len(engine.running) == 2")
        engine.step()
        await talk.to_end()
        await talk.ask(request_id="d", max_tokens=1)
        await talk.to_end()
        await stage.until("engine.running")


async def test_sockets_of_one_replica_are_bounded(valkey_url: str, tmp_path: Path) -> None:
    async with staged(valkey_url, tmp_path, ScriptedEngine(), sockets_max=1) as stage:
        async with stage.socket() as first:
            await first.ask()
            await first.to_end()
            async with stage.socket() as second:
                assert (await second.closed())[0] == 1013
        async with asyncio.timeout(5):
            while stage.api.services.sockets:
                await asyncio.sleep(0.01)
        async with stage.socket() as third:
            await third.ask()
            await third.to_end()


async def test_a_wrong_key_and_a_key_without_the_scope_are_refused(stage: Stage) -> None:
    reader = (await stage.api.new_key("read"))["Authorization"].removeprefix("Bearer ")
    for key in ("ip_nobody-knows-this-key", reader):
        async with stage.socket(key=key) as talk:
            assert code_of(await talk.next()) == "UNAUTHORIZED"
            assert (await talk.closed())[0] == 1008


async def test_the_first_message_can_say_who_speaks(stage: Stage) -> None:
    async with stage.socket(key=None) as talk:
        await talk.send({"type": "auth", "api_key": ADMIN_KEY})
        assert await talk.next() == {"type": "auth_ok"}
        await talk.ask()
        assert (await talk.to_end())[-1]["type"] == "stream_end"


@pytest.mark.parametrize(
    "message",
    [
        {"type": "auth", "api_key": "ip_nobody-knows-this-key"},
        {"type": "inference", "request": {"prompt": "x"}},
        {"type": "other"},
        "no json",
    ],
)
async def test_nothing_else_is_heard_before_a_good_key(stage: Stage, message: object) -> None:
    async with stage.socket(key=None) as talk:
        await talk.send(message)
        assert (await talk.next())["type"] == "error"
        assert (await talk.closed())[0] == 1008
    assert stage.engine.submitted == []


async def test_a_socket_that_does_not_say_who_it_is_is_closed(
    valkey_url: str, tmp_path: Path
) -> None:
    async with (
        staged(valkey_url, tmp_path, ScriptedEngine(), socket_auth_s=0.05) as stage,
        stage.socket(key=None) as talk,
    ):
        assert await talk.closed() == (1008, "no auth message in time")


async def test_a_key_revoked_meanwhile_is_refused_at_the_next_request(stage: Stage) -> None:
    made = (await stage.api.http.post("/v1/keys", json={"name": "k", "scopes": ["execute"]})).json()
    async with stage.socket(key=made["key"]) as talk:
        await talk.ask()
        await talk.to_end()
        await stage.api.http.delete(f"/v1/keys/{made['id']}")
        await talk.ask()
        assert code_of(await talk.next()) == "UNAUTHORIZED"
        assert (await talk.closed())[0] == 1008


async def test_local_development_needs_no_key_but_no_foreign_page_speaks(
    valkey_url: str, tmp_path: Path
) -> None:
    async with staged(valkey_url, tmp_path, ScriptedEngine(), dev=True) as stage:
        async with stage.socket(key=None) as talk:
            await talk.ask()
            assert (await talk.to_end())[-1]["type"] == "stream_end"
        async with stage.socket(key=None, origin="https://evil.example") as talk:
            await talk.ask()
            assert code_of(await talk.next()) == "UNAUTHORIZED"


async def test_an_idle_socket_is_closed_and_a_waiting_one_is_not(
    valkey_url: str, tmp_path: Path
) -> None:
    engine = ScriptedEngine(is_manual=True)
    async with (
        staged(valkey_url, tmp_path, engine, socket_idle_s=0.1) as stage,
        stage.socket() as talk,
    ):
        await talk.ask(max_tokens=1)
        await stage.until("engine.running")
        await asyncio.sleep(0.3)  # three idle time-outs
        engine.step()
        assert (await talk.to_end())[-1]["type"] == "stream_end"
        assert await talk.closed() == (1000, "idle")


async def test_compression_is_agreed_on(stage: Stage) -> None:
    async with stage.socket() as talk:
        names = [extension.name for extension in talk.connection.protocol.extensions]
        assert names == ["permessage-deflate"]
    async with stage.socket(compression=None) as talk:
        assert talk.connection.protocol.extensions == []
        await talk.ask()
        await talk.to_end()


async def test_a_restart_closes_every_socket_with_1012_and_ends_its_work(manual: Stage) -> None:
    async with manual.socket() as talk, manual.socket() as idle:
        await talk.ask()
        await manual.until("engine.running")
        manual.server.should_exit = True
        assert (await talk.closed())[0] == 1012
        assert (await idle.closed())[0] == 1012
        await manual.until("engine.aborted")


async def raw_socket(stage: Stage) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that speaks the handshake and one request, and reads nothing unless told to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port, limit=1024)
    head = (
        f"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1:{stage.port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        f"Sec-WebSocket-Version: 13\r\nAuthorization: Bearer {ADMIN_KEY}\r\n\r\n"
    )
    writer.write(head.encode())
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


def masked(text: str) -> bytes:
    """A text frame of a client, with a mask of zeros; at most 125 bytes."""
    payload = text.encode()
    return bytes((0x81, 0x80 | len(payload), 0, 0, 0, 0)) + payload


async def test_a_client_that_does_not_read_is_cut_off_and_hurts_nobody(
    valkey_url: str, tmp_path: Path
) -> None:
    # Long words, so that the kernel's buffers are full soon.
    engine = ScriptedEngine(script=lambda request: ["x" * 20_000] * (request.max_tokens or 1))
    async with staged(valkey_url, tmp_path, engine, socket_stall_s=0.5) as stage:
        _, writer = await raw_socket(stage)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        ask = '{"type":"inference","request_id":"%d","request":{"prompt":"x","max_tokens":2000}}'
        for index in range(4):
            writer.write(masked(ask % index))
        await stage.until("len(engine.submitted) == 4")
        async with stage.socket() as other:
            for _ in range(3):
                await other.ask(max_tokens=2)
                assert len(text_of(await other.to_end())) == 40_000
        async with asyncio.timeout(20):
            while len(stage.api.services.sockets) > 0:
                await asyncio.sleep(0.02)
        assert stage.engine.running == ()
        writer.transport.abort()


async def test_deltas_merge_while_the_socket_is_slow(valkey_url: str, tmp_path: Path) -> None:
    engine = ScriptedEngine(script=lambda request: ["y" * 5_000] * (request.max_tokens or 1))
    async with (
        staged(valkey_url, tmp_path, engine) as stage,
        stage.socket(max_queue=1, compression=None, max_size=None) as talk,
    ):
        await talk.ask(max_tokens=3000)  # 15 MB, far more than the buffers on the way
        await stage.until("engine.finished")
        said = await talk.to_end()
    assert len(text_of(said)) == 15_000_000
    assert len(said) < 2900


async def test_a_silent_end_of_the_client_leaves_nothing(stage: Stage) -> None:
    async with stage.socket() as talk:
        talk.connection.transport.abort()
    async with asyncio.timeout(5):
        while stage.api.services.sockets:
            await asyncio.sleep(0.01)


async def test_a_stream_token_opens_its_own_path_and_outlives_its_time_on_the_socket(
    stage: Stage,
) -> None:
    wish = {"resource": "/v1/ws", "ttl": 1}
    made = (await stage.api.http.post("/v1/stream-tokens", json=wish)).json()
    async with stage.socket(f"/v1/ws?token={made['token']}", key=None) as talk:
        await asyncio.sleep(1.1)
        await talk.ask()
        assert (await talk.to_end())[-1]["type"] == "stream_end"
    for path in ("/v1/ws", "/hosts/x/v1/ws"):
        async with stage.socket(f"{path}?token={made['token']}", key=None) as talk:
            assert code_of(await talk.next()) == "UNAUTHORIZED"


async def test_every_request_is_billed_to_its_key_with_what_came_to_nothing(
    manual: Stage,
) -> None:
    key = await manual.api.new_key("execute")
    async with manual.socket(key=key["Authorization"].removeprefix("Bearer ")) as talk:
        await talk.ask("one two", request_id="a", max_tokens=2)
        await talk.ask("one two three", request_id="b")
        await manual.until("len(engine.running) == 2")
        manual.engine.step()
        manual.engine.step()
        while (await talk.next())["type"] != "stream_end":
            pass
    await manual.until("engine.aborted")
    async with asyncio.timeout(5):
        report: dict[str, object] = {"items": []}
        while not report["items"] or report["items"][0]["totalTokens"] < 6:  # type: ignore[index]
            await asyncio.sleep(0.02)
            report = (await manual.api.http.get("/v1/usage?groupBy=workflow")).json()
    item = report["items"][0]  # type: ignore[index]
    # The scripted engine tells of the prompt with the last token only, and b never had one.
    assert (item["workflow"], item["promptTokens"], item["completionTokens"]) == ("websocket", 2, 4)
    assert item["wasted"] == {"cancelled": 2}


async def test_a_keys_limit_counts_requests_not_sockets(stage: Stage) -> None:
    key = await stage.api.new_key("execute", rateLimit={"requests": 2, "window": "60s"})
    bare = key["Authorization"].removeprefix("Bearer ")
    for expected in ("stream_end", "stream_end", "error"):
        async with stage.socket(key=bare) as talk:
            await talk.ask()
            last = (await talk.to_end())[-1]
            assert last["type"] == expected
    assert code_of(last) == "RATE_LIMIT_EXCEEDED"


async def test_an_answer_that_another_host_went_on_with_says_so(stage: Stage) -> None:
    class Lost:
        """A link whose first replica is lost in the middle."""

        async def generate(
            self, request: GenerationRequest, placement: Placement
        ) -> AsyncIterator[Chunk]:
            yield Chunk("one ", (1,), usage=Usage(3, 1))
            yield Chunk("two", (2,), resumed=Resumed.APPROXIMATE, usage=Usage(3, 2))
            yield Chunk("", (), FinishReason.STOP, Usage(3, 2), resumed=Resumed.APPROXIMATE)

    object.__setattr__(stage.api.services, "inference", Lost())
    async with stage.socket() as talk:
        await talk.ask()
        said = await talk.to_end()
    assert text_of(said) == "one two"
    assert said[-1]["resumed"] == "approximate"
    ANSWERS.validate_python(said[-1])

"""Streams over a network that cuts them: every event once, in order, one execution."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferpipe import (
    AsyncInferPipe,
    ExecutionFailedError,
    InferPipe,
    InferPipeConnectionError,
    InferPipeError,
    InferPipeProtocolError,
    NotFoundError,
    StreamChunk,
)
from inferpipe._stream import RECONNECTS_MAX
from inferpipe.wire import encode_sse

RESULT = {"id": "e1", "status": "completed", "data": "Hällo 😀", "workflowId": "w",
          "workflowVersion": 1, "executionId": "e1", "timestamp": "t"}  # fmt: skip


def frame(seq: int, event: str, **data: Any) -> bytes:
    body = json.dumps({"executionId": "e1", **data}, ensure_ascii=False).encode()
    return encode_sse(event, body, seq)


def journal(status: str = "completed") -> list[bytes]:
    return [
        frame(1, "execution.started"),
        frame(2, "step.started", step="s"),
        *(frame(3 + at, "chunk", data=text, step="s") for at, text in enumerate("Hällo 😀")),
        frame(10, "step.completed", step="s"),
        frame(11, f"execution.{status}", **{**RESULT, "status": status}),
    ]


def afresh(error: Exception) -> Exception:
    # The same exception raised thousands of times would keep the frames of every time.
    return type(error)(*error.args)


class CutBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Gives the bytes in small pieces up to the cut, then ends, cleanly or with an error."""

    def __init__(self, content: bytes, piece: int, error: Exception | None) -> None:
        self.pieces = [content[at : at + piece] for at in range(0, len(content), piece)]
        self.error = error

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        if self.error is not None:
            raise afresh(self.error)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


BROKEN = httpx.RemoteProtocolError("peer closed connection")
Plan = int | Exception | httpx.Response  # cut after so many bytes, or no stream at all


class Server:
    """A journal behind connections that go as planned; after the plan, they hold."""

    def __init__(self, plan: list[Plan], events: list[bytes] | None = None, piece: int = 5) -> None:
        self.plan = list(plan)
        self.events = journal() if events is None else events
        self.piece = piece
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        cursor = int(request.headers.get("last-event-id", 0))
        content = b": keep-alive\n\n" + b"".join(self.events[cursor:])
        planned = self.plan.pop(0) if self.plan else len(content)
        if isinstance(planned, Exception):
            raise afresh(planned)
        if isinstance(planned, httpx.Response):
            # A response is used up by one client; a plan may be drawn for both.
            return httpx.Response(
                planned.status_code, headers=planned.headers, stream=planned.stream
            )
        error = BROKEN if planned % 2 and planned < len(content) else None
        return httpx.Response(
            200,
            headers={"content-type": "text/event-stream", "x-execution-id": "e1"},
            stream=CutBody(content[:planned], self.piece, error),
        )

    async def async_sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def sync_client(server: Server) -> InferPipe:
    return InferPipe(
        transport=httpx.MockTransport(server), sleep=server.slept.append, jitter=lambda: 0.5
    )


def follow(server: Server, kind: str) -> list[int | None]:
    """Follow to the end with either client; return the ids of the events."""
    if kind == "sync":
        with sync_client(server) as client:
            return [event.id for event in client.execute_stream("w", {}).events()]

    async def follow_async() -> list[int | None]:
        transport = httpx.MockTransport(server)
        async with AsyncInferPipe(
            transport=transport, sleep=server.async_sleep, jitter=lambda: 0.5
        ) as client:
            return [event.id async for event in client.execute_stream("w", {}).events()]

    return asyncio.run(follow_async())


kinds = pytest.mark.parametrize("kind", ["sync", "async"])


def test_stream_yields_chunks_and_then_has_the_result() -> None:
    with sync_client(Server([])) as client, client.execute_stream("w", {}) as stream:
        assert stream.execution_id == "e1"
        with pytest.raises(InferPipeError, match="has not ended"):
            _ = stream.result
        assert list(stream) == [StreamChunk(text, "s") for text in "Hällo 😀"]
        assert stream.result.data == "Hällo 😀"


async def test_async_stream_yields_chunks_and_then_has_the_result() -> None:
    async with AsyncInferPipe(transport=httpx.MockTransport(Server([]))) as client:
        async with client.execute_stream("w", {}) as stream:
            assert stream.execution_id == "e1"
            assert "".join([chunk.data async for chunk in stream]) == "Hällo 😀"
        assert stream.result.data == "Hällo 😀"
        assert [c.data async for c in client.execute_stream("w", {})] == list("Hällo 😀")


CUTS = st.integers(0, sum(map(len, journal())))
TROUBLE = st.sampled_from(
    [httpx.ConnectError("refused"), httpx.ReadTimeout("silent"), httpx.Response(503),
     httpx.Response(429, headers={"retry-after": "2"}), httpx.Response(502)]
)  # fmt: skip


@given(CUTS, st.lists(CUTS | TROUBLE, max_size=RECONNECTS_MAX - 1), st.integers(1, 200))
def test_cut_stream_gives_every_event_once(first: int, later: list[Plan], piece: int) -> None:
    for kind in ("sync", "async"):
        server = Server([first, *later], piece=piece)
        assert follow(server, kind) == list(range(1, 12))
        post, *reconnects = server.requests
        assert (post.method, post.url.path) == ("POST", "/v1/execute/stream")
        assert all(
            (request.method, request.url.path) == ("GET", "/v1/executions/e1/stream")
            for request in reconnects
        )


@kinds
def test_stream_survives_a_cut_after_every_single_event(kind: str) -> None:
    # Each connection brings one event and half of the next: far more cuts than RECONNECTS_MAX.
    events = [frame(seq, "chunk", data="x", step="s") for seq in range(1, 200)]
    events.append(frame(200, "execution.completed", **RESULT))
    cut = len(b": keep-alive\n\n") + len(events[0]) + 30
    server = Server([cut + at % 2 for at in range(199)], events)  # clean and broken ends in turn
    assert follow(server, kind) == list(range(1, 201))
    assert len(server.requests) == 200
    assert max(server.slept) == 0.25


@kinds
def test_server_that_repeats_itself_is_deduplicated(kind: str) -> None:
    server = Server([], [event for event in journal() for _ in range(3)])
    assert follow(server, kind) == list(range(1, 12))


@kinds
def test_reconnects_are_bounded_and_back_off(kind: str) -> None:
    server = Server([300, *[0] * 50])
    with pytest.raises(InferPipeConnectionError, match="execution e1 was lost, and 10 reconnects"):
        follow(server, kind)
    assert len(server.requests) == 1 + RECONNECTS_MAX
    assert server.slept == [0.25, 0.5, 1.0, 2.0, *[4.0] * 6]


@kinds
def test_204_on_reconnect_fetches_the_record(kind: str) -> None:
    record = httpx.Response(200, json={**RESULT, "createdAt": "2026-11-21T05:24:00Z"})
    events = journal()[:4]
    server = Server([len(b": keep-alive\n\n") + sum(map(len, events)), httpx.Response(204), record])
    assert follow(server, kind) == [1, 2, 3, 4, None]
    assert server.requests[1].headers["last-event-id"] == "4"
    assert server.requests[2].url.path == "/v1/executions/e1"


@kinds
def test_204_of_an_execution_that_runs_is_a_protocol_error(kind: str) -> None:
    record = {**RESULT, "status": "running", "createdAt": "2026-11-21T05:24:00Z"}
    server = Server([0, httpx.Response(204), httpx.Response(200, json=record)])
    with pytest.raises(InferPipeProtocolError, match="yet it is running"):
        follow(server, kind)


@kinds
def test_refused_reconnect_raises_what_the_server_says(kind: str) -> None:
    with pytest.raises(NotFoundError):
        follow(Server([0, httpx.Response(404)]), kind)


@kinds
@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_stream_raises_at_its_end_unless_completed(kind: str, status: str) -> None:
    with pytest.raises(ExecutionFailedError) as caught:
        follow(Server([], journal(status)), kind)
    assert caught.value.result.status == status


def test_failed_stream_gives_its_events_and_result_all_the_same() -> None:
    with sync_client(Server([], journal("failed"))) as client:
        stream = client.execute_stream("w", {})
        events = stream.events()
        seen = [next(events).type for _ in journal()]
        with pytest.raises(ExecutionFailedError):
            next(events)
    assert seen[-1] == "execution.failed"
    assert stream.result.status == "failed"


@kinds
def test_gap_without_an_id_is_handed_out_and_leaves_the_cursor(kind: str) -> None:
    gap = encode_sse("gap", b'{"executionId": "e1"}', None)
    events = journal()
    assert follow(Server([], [events[0], gap, *events[5:]]), kind) == [1, None, *range(6, 12)]


def test_opening_is_retried_with_one_key() -> None:
    server = Server([httpx.ConnectError("refused"), httpx.Response(503)])
    assert len(follow(server, "sync")) == 11
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 1
    assert server.requests[0].extensions["timeout"]["read"] == 60.0


@pytest.mark.parametrize(
    "content",
    [
        b"id: x\nevent: chunk\ndata: {}\n\n",
        b"id: 1\nevent: chunk\ndata: {\n\n",
        b"id: 1\nevent: chunk\ndata: []\n\n",
        b"id: 1\nevent: execution.completed\ndata: {}\n\n",
    ],
)
@kinds
def test_unreadable_event_is_a_protocol_error(kind: str, content: bytes) -> None:
    with pytest.raises(InferPipeProtocolError):
        follow(Server([], [content]), kind)


def test_chunk_without_text_is_a_protocol_error() -> None:
    with (
        sync_client(Server([], [frame(1, "chunk", step="s")])) as client,
        pytest.raises(InferPipeProtocolError, match="chunk without text"),
    ):
        list(client.execute_stream("w", {}))


@kinds
def test_answer_that_is_no_stream_is_a_protocol_error(kind: str) -> None:
    with pytest.raises(InferPipeProtocolError, match="application/json"):
        follow(Server([httpx.Response(200, json={})]), kind)


def test_connection_is_given_back_however_the_stream_is_left() -> None:
    closed = []

    class Body(CutBody):
        def close(self) -> None:
            closed.append(1)

    def answer(_: httpx.Request) -> httpx.Response:
        body = Body(b"".join(journal()), 50, None)
        headers = {"content-type": "text/event-stream", "x-execution-id": "e1"}
        return httpx.Response(200, headers=headers, stream=body)

    with InferPipe(transport=httpx.MockTransport(answer)) as client:
        with client.execute_stream("w", {}):
            pass
        assert len(closed) == 1
        list(client.execute_stream("w", {}))
        assert len(closed) == 2
        with client.execute_stream("w", {}) as stream:
            for _ in stream:
                break
        assert len(closed) == 3


@kinds
@pytest.mark.parametrize("content_type", ["text/event-stream", "text/html"])
def test_no_connection_is_left_open(kind: str, content_type: str) -> None:
    still_open: list[CutBody] = []

    class Body(CutBody):
        def close(self) -> None:
            still_open.remove(self)

        async def aclose(self) -> None:
            self.close()

    def answer(_: httpx.Request) -> httpx.Response:
        assert not still_open
        still_open.append(Body(b": hi\n\n", 50, BROKEN))
        headers = {"content-type": content_type, "x-execution-id": "e1"}
        return httpx.Response(200, headers=headers, stream=still_open[0])

    async def no_sleep(_: float) -> None:
        pass

    transport = httpx.MockTransport(answer)
    stream: Any
    if kind == "sync":
        stream = InferPipe(transport=transport, sleep=lambda _: None).execute_stream("w", {})
        with pytest.raises(InferPipeError), stream:
            list(stream)
    else:
        stream = AsyncInferPipe(transport=transport, sleep=no_sleep).execute_stream("w", {})

        async def follow_async() -> None:
            async with stream:
                [chunk async for chunk in stream]

        with pytest.raises(InferPipeError):
            asyncio.run(follow_async())
    assert not still_open


@kinds
def test_reconnect_heeds_retry_after(kind: str) -> None:
    busy = [httpx.Response(503, headers={"retry-after": asked}) for asked in ("7", "3600")]
    server = Server([0, *busy])
    assert follow(server, kind) == list(range(1, 12))
    assert server.slept == [0.25, 7.0, 0.5, 60.0, 1.0]


def test_execution_id_may_come_with_the_first_event() -> None:
    headers = {"content-type": "text/event-stream"}
    first = httpx.Response(200, headers=headers, stream=CutBody(journal()[0], 9, BROKEN))
    server = Server([first])
    assert follow(server, "sync") == list(range(1, 12))
    assert server.requests[1].url.path == "/v1/executions/e1/stream"


def test_stream_lost_before_its_id_is_opened_again_by_its_key() -> None:
    headers = {"content-type": "text/event-stream"}
    server = Server([httpx.Response(200, headers=headers, stream=CutBody(b"", 9, BROKEN))])
    assert follow(server, "sync") == list(range(1, 12))
    first, second = server.requests
    assert (second.method, second.content) == ("POST", first.content)
    assert second.headers["idempotency-key"] == first.headers["idempotency-key"]

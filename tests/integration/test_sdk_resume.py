"""The SDK's streams through a network that is cut twenty times: every event once, in order."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from inferpipe import AsyncInferPipe, InferPipe, StreamEvent
from serve_app.adapters.system import SystemClock
from serve_app.core.inference import Chunk, FinishReason, GenerationRequest, Grant, Usage
from serve_app.services.inference import Inference
from tests.support.api import ADMIN_KEY, Api, ScriptedPlane, running_api
from tests.support.listening import listening
from tests.support.tcp_proxy import TcpProxy

CHUNKS = 500
CUTS = 20
CHAT = {"messages": [{"role": "user", "content": "count"}]}
TEXT = "".join(f"{at} " for at in range(CHUNKS))


class SlowPlane(ScriptedPlane):
    """Gives the next delta when the last one is in the journal, so that each is an event."""

    def __init__(self) -> None:
        self.api: Api | None = None

    async def generate(
        self, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        execution_id = request.request_id.partition("/")[0]
        for at in range(CHUNKS):
            before = await self.journal_length(execution_id)
            is_last = at == CHUNKS - 1
            yield Chunk(f"{at} ", (at,), FinishReason.STOP if is_last else None, Usage(1, at + 1))
            while not is_last and await self.journal_length(execution_id) == before:
                await asyncio.sleep(0)

    async def journal_length(self, execution_id: str) -> int:
        assert self.api is not None
        return (await self.api.services.executions.load("default", execution_id)).seq


@dataclass
class Line:
    """The service, straight and by way of the proxy that is cut."""

    straight: str
    url: str
    proxy: TcpProxy

    def cut_now_and_then(self, cut: Callable[[], object]) -> Callable[[], None]:
        """A function to call at each event; it cuts the line twenty times on the way."""
        seen = itertools.count(1)

        def look() -> None:
            if next(seen) % (CHUNKS // CUTS) == 0:
                cut()

        return look

    async def check(self, events: list[StreamEvent], execution_id: str | None) -> None:
        """What came by the cut line is what the journal holds."""
        assert execution_id is not None
        async with AsyncInferPipe(ADMIN_KEY, base_url=self.straight) as client:
            stream = client.executions.follow(execution_id)
            assert events == [event async for event in stream.events()]
        chunks = [event.data["data"] for event in events if event.type == "chunk"]
        assert "".join(chunks) == TEXT
        assert len(chunks) >= CHUNKS - 5  # two deltas of one event-loop turn may be one event
        assert self.proxy.cut_count >= CUTS


@pytest.fixture
async def line(valkey_url: str, tmp_path: Path) -> AsyncIterator[Line]:
    plane = SlowPlane()
    inference = Inference(plane, plane, SystemClock(), resume_wait_s=1.0)
    async with (
        running_api(valkey_url, tmp_path, inference) as plane.api,
        listening(plane.api.app) as url,
        TcpProxy.before(url) as proxy,
    ):
        yield Line(url, proxy.url(url), proxy)


async def test_async_stream_gives_each_event_once(line: Line) -> None:
    look = line.cut_now_and_then(line.proxy.cut)
    events = []
    async with AsyncInferPipe(ADMIN_KEY, base_url=line.url, jitter=soon) as client:
        stream = client.execute_stream("chat-assistant", CHAT)
        async for event in stream.events():
            events.append(event)
            look()
    await line.check(events, stream.execution_id)


async def test_sync_stream_gives_each_event_once(line: Line) -> None:
    loop = asyncio.get_running_loop()

    async def cut() -> None:
        line.proxy.cut()

    look = line.cut_now_and_then(lambda: asyncio.run_coroutine_threadsafe(cut(), loop).result(30))
    events = []

    def follow() -> str | None:
        with InferPipe(ADMIN_KEY, base_url=line.url, jitter=soon) as client:
            stream = client.execute_stream("chat-assistant", CHAT)
            for event in stream.events():
                events.append(event)
                look()
            return stream.execution_id

    await line.check(events, await asyncio.to_thread(follow))


def soon() -> float:
    """Reconnect after 10 ms, not after 250."""
    return 0.02

"""WebSocket clients of the real application: uvicorn on the loopback, a scripted engine behind."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from serve_app.adapters.system import SystemClock
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.services.inference import Inference
from tests.support.api import ADMIN_KEY, Api, running_api
from tests.support.link_pair import Pair, running
from tests.support.scripted_engine import ScriptedEngine

PATIENCE_S = 10  # generous: a busy machine is no defect


@dataclass
class PairRouter:
    """An admission that sends all to one replica, or raises what a test sets."""

    pair: Pair
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.admitted: list[AdmitRequest] = []

    async def admit(self, request: AdmitRequest) -> Grant:
        self.admitted.append(request)
        if self.error is not None:
            raise self.error
        return self.pair.grant(request.request_id)


@dataclass
class Stage:
    """The application with one replica, and sockets to it."""

    api: Api
    pair: Pair
    router: PairRouter
    server: uvicorn.Server
    port: int

    @property
    def engine(self) -> ScriptedEngine:
        return self.pair.engine

    @asynccontextmanager
    async def socket(
        self, path: str = "/v1/ws", key: str | None = ADMIN_KEY, **options: object
    ) -> AsyncIterator["Talk"]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = f"ws://127.0.0.1:{self.port}{path}"
        async with connect(url, additional_headers=headers, **options) as connection:  # type: ignore[arg-type]
            yield Talk(connection)

    async def until(self, is_met: str) -> None:
        await self.pair.until(is_met)


@dataclass
class Talk:
    """One socket, with the words of the protocol."""

    connection: ClientConnection

    async def send(self, message: object) -> None:
        await self.connection.send(message if isinstance(message, str) else json.dumps(message))

    async def ask(
        self, prompt: object = "say it", request_id: str | None = None, **more: object
    ) -> None:
        message: dict[str, object] = {"type": "inference", "request": {"prompt": prompt, **more}}
        await self.send(message if request_id is None else {**message, "request_id": request_id})

    async def next(self) -> dict[str, object]:
        async with asyncio.timeout(PATIENCE_S):
            return dict(json.loads(await self.connection.recv()))

    async def to_end(self) -> list[dict[str, object]]:
        """Messages up to the first that ends a request."""
        found = [await self.next()]
        while found[-1]["type"] not in {"stream_end", "error"}:
            found.append(await self.next())
        return found

    async def closed(self) -> tuple[int, str]:
        """The code and reason of the close; what is said before is skipped."""
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionClosed):
                async for _ in self.connection:
                    pass
            await self.connection.wait_closed()
        return self.connection.close_code or 0, self.connection.close_reason or ""


def text_of(messages: list[dict[str, object]]) -> str:
    return "".join(str(m["content"]) for m in messages if m["type"] == "stream_chunk")


@asynccontextmanager
async def staged(
    url: str, data_dir: Path, engine: ScriptedEngine, **given: object
) -> AsyncIterator[Stage]:
    """The application over an emptied store; `given` are settings."""
    async with running(engine) as pair:
        router = PairRouter(pair)
        inference = Inference(router, pair.link, SystemClock(), resume_wait_s=0.2)
        async with running_api(url, data_dir, inference, **given) as api:
            config = uvicorn.Config(
                api.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"
            )
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            try:
                yield Stage(api, pair, router, server, port)
            finally:
                server.should_exit = True
                await asyncio.wait((serving,))

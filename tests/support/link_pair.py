"""A replica with a scripted engine and a client of it, joined by a real link on the loopback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.tcp_link_server import TokenLinkServer
from serve_app.adapters.tcp_link_wire import LinkSettings
from serve_app.core.grants import sign_grant
from serve_app.core.inference import Chunk, GenerationRequest, Grant, Message
from tests.support.scripted_engine import ScriptedEngine

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

"""OpenAI's surface without Ray: a tiny vLLM engine, its link, the application on a real port."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from deployments.composition import compose, publish
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.tcp_link_server import TokenLinkServer
from serve_app.adapters.vllm_engine import EngineSettings, VllmEngine
from serve_app.core.errors import NoHostsAvailableError
from serve_app.core.grants import sign_grant
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.core.routing import Decision
from serve_app.ingress.app import create_app
from serve_app.services.inference import Inference
from serve_app.settings import Settings
from tests.support.tiny_model import make_tiny_model

KEY = "ip_openai-test-key-0123456789"
SECRET = "a-secret-of-the-tests"
NAMES = ("acme/tiny", "gpt-tiny")
CONTEXT = 512


@dataclass
class OneReplica:
    """Admission to the one replica there is, unless it is closed."""

    server: TokenLinkServer
    is_open: bool = True

    async def admit(self, request: AdmitRequest) -> Grant:
        if not self.is_open:
            raise NoHostsAvailableError("no replica is ready")
        endpoint = ("replica-1", "127.0.0.1", self.server.port)
        expires_at_ms = SystemClock().now_ms() + 10_000
        return sign_grant(SECRET.encode(), request.request_id, endpoint, expires_at_ms)

    async def decisions(self, limit: int) -> Sequence[Decision]:
        return ()


@dataclass
class OpenAiService:
    """The running surface."""

    url: str
    engine: VllmEngine
    admission: OneReplica
    model_path: Path = Path()

    def break_links(self) -> None:
        """As if the network had cut every connection to the replica."""
        for connection in tuple(self.admission.server.connections):
            connection.break_off("the test pulled the plug")

    async def until_running(self, count: int) -> None:
        """Wait until the engine runs so many requests."""
        async with asyncio.timeout(20):
            while self.engine.load().running_count != count:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_openai(
    redis_url: str, path: Path, *, is_embedding: bool = False
) -> AsyncIterator[OpenAiService]:
    clock, entropy = SystemClock(), SystemEntropy()
    model = make_tiny_model(path / "model", context_max=CONTEXT, is_embedding=is_embedding)
    runner: Any = "pooling" if is_embedding else "auto"
    engine = VllmEngine.start(
        EngineSettings(str(model), NAMES, kv_cache_gib=0.25, dtype="float32", runner=runner), clock
    )
    server = TokenLinkServer(engine, SECRET.encode(), "replica-1", clock, entropy)
    await server.start()
    link = TcpTokenLink(SECRET.encode(), clock, entropy)
    settings = Settings(
        redis_url=redis_url,  # type: ignore[arg-type]
        data_dir=path,
        api_key=KEY,  # type: ignore[arg-type]
        cluster_secret=SECRET,  # type: ignore[arg-type]
        model=str(model),
        model_name=",".join(NAMES),
        model_runner=runner,
        partitions=4,
    )
    stores = connect(settings, clock)
    admission = OneReplica(server)
    inference = Inference(admission, link, clock, resume_wait_s=0.5)
    services = compose(settings, stores, inference, clock, entropy)
    await publish(services)
    assert services.openai is not None
    serving = asyncio.ensure_future(services.openai.run())
    config = uvicorn.Config(create_app(services), port=0, log_level="warning", lifespan="off")
    http = uvicorn.Server(config)
    running = asyncio.ensure_future(http.serve())
    while not http.started:
        await asyncio.sleep(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    try:
        yield OpenAiService(f"http://127.0.0.1:{port}/v1", engine, admission)
    finally:
        http.should_exit = True
        await running
        serving.cancel()
        await asyncio.wait((serving,))
        await link.close()
        await server.close()
        await engine.stop()
        await stores.close()

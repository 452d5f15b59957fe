"""The whole HTTP API without Ray: the real application and an executor over one Valkey."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from deployments.composition import compose, publish
from deployments.definitions import children_of
from deployments.events import carry_out_events, timekeeper_of
from deployments.webhooks import endings_of, guarded_http
from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_bells import RedisBells, worker_channels
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.core.errors import StoreUnavailableError
from serve_app.core.inference import (
    AdmitRequest,
    Chunk,
    FinishReason,
    GenerationRequest,
    Grant,
    Usage,
)
from serve_app.core.routing import Candidate, Decision
from serve_app.ingress.app import Services, create_app
from serve_app.services.executor import Executor, WorkerLimits
from serve_app.services.inference import Inference
from serve_app.services.planner import Runtime
from serve_app.settings import Settings
from serve_app.steps import step_types
from tests.support.valkey_cluster import flush

ADMIN_KEY = "ip_surface-test-key-0123456789"
USAGE = Usage(prompt_tokens=11, completion_tokens=3, cached_tokens=4)


class ScriptedPlane:
    """A router and a link whose every answer is the same three tokens."""

    async def admit(self, request: AdmitRequest) -> Grant:
        return Grant(request.request_id, "host", "127.0.0.1", 1, 0, "")

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        near = Candidate("host", 12.5, 10.0, 128, 64, 3)
        far = Candidate("far", refusal="draining")
        decision = Decision("r1", 0, "m", 200, "prefix", near, (near, far), 11.0, 128)
        return (decision,) * min(limit, 60)

    async def generate(
        self, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        yield Chunk("three ", (1,), usage=Usage(11, 1, 4))
        yield Chunk("small tokens", (2, 3), FinishReason.STOP, USAGE)


@dataclass
class Api:
    """The running application, and a client that calls it as the first admin."""

    app: FastAPI
    services: Services
    http: httpx.AsyncClient

    async def new_key(self, *scopes: str, **wish: object) -> dict[str, str]:
        """The headers of a new key in the first workspace."""
        made = await self.http.post("/v1/keys", json={"name": "t", "scopes": scopes, **wish})
        assert made.status_code == 201, made.text
        return {"Authorization": f"Bearer {made.json()['key']}"}

    async def new_workspace(self, name: str) -> dict[str, str]:
        """The headers of the admin key of a new workspace."""
        made = await self.http.post("/v1/workspaces", json={"id": name})
        assert made.status_code == 201, made.text
        return {"Authorization": f"Bearer {made.json()['apiKey']}"}

    async def lose_the_store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let health find the store away, and return when it has."""

        async def away() -> int:
            raise StoreUnavailableError("the store cannot be reached")

        monkeypatch.setattr(self.services.health, "_store", SimpleNamespace(live_workers=away))
        while self.services.health.sample.status == "healthy":
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_api(
    url: str, data_dir: Path, inference: Inference | None = None, **given: object
) -> AsyncIterator[Api]:
    """The application over an emptied store, with one executor."""
    await flush(url)
    settings = Settings(
        redis_url=url,  # type: ignore[arg-type]
        data_dir=data_dir,
        api_key=ADMIN_KEY,  # type: ignore[arg-type]
        cluster_secret="a-secret-of-the-tests",  # type: ignore[arg-type]
        partitions=4,
        model_replicas=0,
        **given,  # type: ignore[arg-type]
    )
    clock, entropy = SystemClock(), SystemEntropy()
    stores = connect(settings, clock)
    inference = inference or Inference(ScriptedPlane(), ScriptedPlane(), clock, resume_wait_s=1.0)
    composed = compose(settings, stores, inference, clock, entropy)
    services = replace(composed, is_behind_serve=False)
    await publish(services)
    children = children_of(settings, stores.calls, clock, lambda: services.catalog)
    way_out = guarded_http(settings)
    types = step_types(
        inference, JsonSchemas(), entropy, way_out, settings.http_answer_max_bytes, children
    )
    carry_out_events(settings, stores, services.catalog, clock)
    endings = endings_of(settings, stores.calls, clock)
    runtime = Runtime(stores.store, types, CelExpressions(), clock, entropy, endings.outgoing)
    bells = RedisBells(stores.nodes, worker_channels("w1", settings.partitions), clock)
    executor = Executor("w1", runtime, bells, services.catalog, WorkerLimits(3000, 200, 64))
    keeper = timekeeper_of(settings, stores, services.catalog, clock, "w1")
    works = (services.feeds.run(), executor.run(), keeper.run())
    running = [asyncio.ensure_future(work) for work in works]
    while not executor.beat_at_s:
        await asyncio.sleep(0.005)
    running.append(asyncio.ensure_future(services.health.run()))
    while services.health.sample.status != "healthy":
        await asyncio.sleep(0.005)
    app = create_app(services)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:8000", headers=headers, timeout=30
    ) as http:
        yield Api(app, services, http)
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await way_out.close()
    await stores.close()

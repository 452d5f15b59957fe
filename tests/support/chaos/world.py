"""The service under test: a store, the network before it, processes that can die, and a receiver.

Every process reaches the store through a proxy of its own, so that each can lose its connections
alone. The ingress is in this process; what it says is the driver's truth.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from deployments.composition import compose
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.redis_library import RedisLibrary
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from serve_app.ingress.app import Services
from serve_app.services.inference import Inference
from serve_app.services.webhooks import WebhookWish
from serve_app.settings import Settings
from tests.support.api import ScriptedPlane
from tests.support.chaos.ledger import Ledger
from tests.support.chaos.outside import Outside
from tests.support.chaos.processes import Cast
from tests.support.receiver import receiver
from tests.support.tcp_proxy import TcpProxy

WORKSPACE = "default"
PARTITIONS = 4
SETTINGS: dict[str, Any] = {
    "cluster_secret": "a-secret-of-the-chaos",
    "partitions": PARTITIONS,
    "egress_allow": ["127.0.0.1/32"],
    "webhook_retry_s": [0.3, 0.5, 1, 1, 2, 2, 2, 4, 4, 4],
    "webhook_lease_ms": 1500,
    "retention_s": 3600,
    "model_replicas": 1,
    "openai": False,
    "resume_wait_s": 20,
}


@dataclass
class Actor:
    """A place for one process; who stands there changes with every kill."""

    role: str
    place: int
    proxy: TcpProxy
    name: str = ""
    pid: int = 0

    @property
    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


@dataclass
class World:
    """All of it."""

    directory: Path
    ledger: Ledger
    store: EmbeddedValkey
    cast: Cast
    actors: list[Actor] = field(default_factory=list)
    proxies: list[TcpProxy] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)  # processes that nobody killed, and ended
    effects_url: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)  # settings beside SETTINGS
    services: Services = field(init=False)
    _count: int = 0

    def of_role(self, role: str) -> list[Actor]:
        return [actor for actor in self.actors if actor.role == role]

    def look(self) -> "Redis[bytes]":
        """A client of the store that no fault stands before."""
        return Redis.from_url(self.store.url)

    def settings(self, proxy: TcpProxy) -> dict[str, Any]:
        url = proxy.url(self.store.url)
        return {**SETTINGS, **self.given, "data_dir": str(self.directory), "redis_url": url}

    async def start(self, actor: Actor, offset_ms: int = 0) -> None:
        """Put a new process where the last one died."""
        self._count += 1
        actor.name = f"{actor.role}-{self._count}"
        settings = self.settings(actor.proxy)
        actor.pid = await self.cast.fork(actor.role, actor.name, settings, offset_ms)
        self.ledger.write("start", name=actor.name, pid=actor.pid, offset_ms=offset_ms)

    def kill(self, actor: Actor) -> None:
        """As kill -9."""
        try:
            os.kill(actor.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.deaths.append(actor.name)
        self.ledger.write("kill", name=actor.name)

    async def worker_id(self, actor: Actor) -> str | None:
        """The id under which an executor is known to the store; None before its first beat."""
        async with self.look() as client:
            for known in await client.zrange("ip:{0}:workers", 0, -1):
                if known.decode().endswith(f"~{actor.name}"):
                    return str(known.decode())
        return None

    async def until_ready(self) -> None:
        """Wait until every executor beats and every model has reported."""
        async with asyncio.timeout(30), self.look() as client:
            for actor in self.of_role("executor"):
                while await self.worker_id(actor) is None:
                    assert actor.is_alive, f"{actor.name} ended; see its log"
                    await asyncio.sleep(0.02)
            models = {actor.name.encode() for actor in self.of_role("model")}
            while not models <= set(await client.hkeys("ip:{config}:replicas")):
                await asyncio.sleep(0.02)

    async def plant(self, bug: Mapping[str, str]) -> None:
        """Load the function libraries with a bug, under the names that everybody calls.

        `bug` has what stands instead of each of some passages.
        """
        sources = list(RedisLibrary()._sources)
        for sound, broken in bug.items():
            counts = [source.count(sound) for source in sources]
            assert sum(counts) == 1, f"{sum(counts)} times in the libraries: {sound!r}"
            at = counts.index(1)
            sources[at] = sources[at].replace(sound, broken)
        async with self.look() as client:
            for source in sources:
                await client.function_load(source, replace=True)


@asynccontextmanager
async def a_world(
    directory: Path, executors: int = 3, given: Mapping[str, Any] | None = None
) -> AsyncIterator[World]:
    """Start everything, and end everything that was started."""
    async with AsyncExitStack() as stack:
        ledger = Ledger(directory / "ledger.jsonl")
        stack.callback(ledger.close)
        clock, entropy = SystemClock(), SystemEntropy()
        store = await stack.enter_async_context(EmbeddedValkey(directory, clock, entropy))
        cast = await Cast.begin(directory)
        stack.push_async_callback(cast.end)
        world = World(directory, ledger, store, cast, given=given or {})
        there = await stack.enter_async_context(receiver(Outside(ledger).receive))
        world.effects_url = f"http://127.0.0.1:{there.port}/effects"
        roles = ["executor"] * executors + ["model"] * 2 + ["dispatcher"] * 2
        for place, role in enumerate([*roles, "ingress"]):
            proxy = await stack.enter_async_context(TcpProxy.before(store.url))
            world.proxies.append(proxy)
            if role != "ingress":
                world.actors.append(Actor(role, place, proxy))
        settings = Settings(**world.settings(world.proxies[-1]))
        stores = connect(settings, clock)
        stack.push_async_callback(stores.close)
        inference = Inference(ScriptedPlane(), ScriptedPlane(), clock, resume_wait_s=1.0)
        services = compose(settings, stores, inference, clock, entropy)
        world.services = replace(services, is_behind_serve=False)
        hearing = asyncio.ensure_future(services.feeds.run())
        stack.push_async_callback(_end, hearing)
        wish = WebhookWish(
            url=f"http://127.0.0.1:{there.port}/hook", events=("*",), modes=("async",)
        )
        await services.webhooks.create(WORKSPACE, wish)
        for actor in world.actors:
            await world.start(actor)
        await world.until_ready()
        yield world


async def _end(task: "asyncio.Future[None]") -> None:
    task.cancel()
    await asyncio.wait([task])

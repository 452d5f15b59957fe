"""Several replicas with scripted engines, the real router over them, and a caller: one process.

`kill` is what kill -9 is to the others: every connection breaks at once, nothing is said.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.tcp_link_server import TokenLinkServer
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.core.routing import Decision, ReplicaReport
from serve_app.services.inference import Inference
from serve_app.services.metering import MeteredEngine
from serve_app.services.routing import Router
from tests.support.scripted_engine import ScriptedEngine

SECRET = b"the cluster's secret"


@dataclass
class Replica:
    """One replica; `is_silent` stops its reports."""

    replica_id: str
    engine: ScriptedEngine
    meter: MeteredEngine
    server: TokenLinkServer
    phase: str = "ready"
    is_silent: bool = False

    def report(self, now_ms: int) -> ReplicaReport:
        load = self.server.load()
        return ReplicaReport(load, self.phase, "", now_ms, self.meter.take_news())


@dataclass
class Replicas:
    """The fleet; also the registry that its router hears, and the admission of its caller."""

    make_engine: Callable[[], ScriptedEngine]
    living: dict[str, Replica] = field(default_factory=dict)
    admitted: list[AdmitRequest] = field(default_factory=list)
    resume_wait_s: float = 20.0
    is_router_up: bool = True
    _count: int = 0

    def __post_init__(self) -> None:
        self.clock, entropy = SystemClock(), SystemEntropy()
        self.router = Router(self, SECRET, self.clock, entropy)
        self.link = TcpTokenLink(SECRET, self.clock, entropy)
        self.inference = Inference(self, self.link, self.clock, self.resume_wait_s)
        self._reports: asyncio.Queue[ReplicaReport] = asyncio.Queue()

    async def start(self) -> Replica:
        """One more replica, known to the router when this returns."""
        self._count += 1
        replica_id = f"host-{self._count}"
        engine = self.make_engine()
        meter = MeteredEngine(engine, self.clock)
        server = TokenLinkServer(meter, SECRET, replica_id, self.clock, SystemEntropy())
        await server.start()
        replica = self.living[replica_id] = Replica(replica_id, engine, meter, server)
        self.report()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return replica

    async def kill(self, replica_id: str) -> None:
        """End one without a word; the router goes on believing its last report for a while."""
        replica = self.living.pop(replica_id)
        await replica.server.close()
        await replica.engine.stop()

    def report(self) -> None:
        """Have every replica that lives report now."""
        for replica in self.living.values():
            if not replica.is_silent:
                self._reports.put_nowait(replica.report(self.clock.now_ms()))

    def router_knows(self, replica_id: str) -> str:
        """The phase that the router last heard of."""
        return self.router._fleet.reports[replica_id].phase

    async def admit(self, request: AdmitRequest) -> Grant:
        self.admitted.append(request)
        return await self.router.admit(request)

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        return await self.router.decisions(limit)

    @asynccontextmanager
    async def reports(self) -> AsyncIterator[AsyncIterator[ReplicaReport]]:
        async def stream() -> AsyncIterator[ReplicaReport]:
            while True:
                yield await self._reports.get()

        yield stream()

    async def report_for_ever(self) -> None:
        while True:
            self.report()
            await asyncio.sleep(0.05)


@asynccontextmanager
async def replicas(
    make_engine: Callable[[], ScriptedEngine] = ScriptedEngine,
    count: int = 2,
    resume_wait_s: float = 20.0,
) -> AsyncIterator[Replicas]:
    """So many replicas behind a router."""
    fleet = Replicas(make_engine, resume_wait_s=resume_wait_s)
    running = [
        asyncio.ensure_future(fleet.router.run()),
        asyncio.ensure_future(fleet.report_for_ever()),
    ]
    for _ in range(count):
        await fleet.start()
    try:
        yield fleet
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        await fleet.link.close()
        for replica_id in tuple(fleet.living):
            await fleet.kill(replica_id)

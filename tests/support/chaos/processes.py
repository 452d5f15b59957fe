"""The service's processes without Ray, made to be killed: executors, model replicas, dispatchers.

Each is the product's own code under `deployments`, in an OS process of its own, with a scripted
engine where vLLM would be. They are forked from one process that has imported everything, so that
one more costs milliseconds. Whoever holds that process's standard input holds their lives.
"""

import asyncio
import ctypes
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.webhooks import dispatcher_of, guarded_http
from deployments.worker import Worker
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.redis_replicas import RedisReplicas
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link_server import TokenLinkServer
from serve_app.adapters.telemetry import configure_logging
from serve_app.core.errors import StoreUnavailableError
from serve_app.core.inference import GenerationRequest
from serve_app.core.routing import ReplicaReport
from serve_app.services.metering import MeteredEngine
from serve_app.services.routing import Router
from serve_app.settings import Settings
from tests.support.chaos.oracle import said
from tests.support.scripted_engine import ScriptedEngine

HOST = "127.0.0.1"
logger = logging.getLogger(__name__)
MODEL = "scripted"
PR_SET_PDEATHSIG = 1
REPORT_S = 0.1


@dataclass(frozen=True)
class OffsetClock(SystemClock):
    """The machine's clock, set wrong by so much."""

    offset_ms: int = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.offset_ms


@dataclass(frozen=True)
class NamedEntropy(SystemEntropy):
    """The first token is a name, so that a test can find whose id it is in."""

    name: str
    _drawn: list[str] = field(default_factory=list)

    def token(self) -> str:
        if self._drawn:
            return super().token()
        self._drawn.append(self.name)
        return self.name


async def executor(settings: Settings, name: str, clock: OffsetClock) -> None:
    """One worker until it is killed, or is asked to end."""
    stores = connect(settings, clock)
    secret = settings.cluster_secret.get_secret_value().encode()
    registry = RedisReplicas(stores.nodes, stores.calls, clock)
    router = Router(registry, secret, clock, SystemEntropy())
    worker = Worker(settings, router, clock, NamedEntropy(name), HOST)
    await worker.begin()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(router.run())
            group.create_task(worker.executor.run())
            group.create_task(worker.timekeeper.run())
            group.create_task(worker.watch_peers())
    finally:
        await worker.close()
        await stores.close()


async def model(settings: Settings, name: str, clock: OffsetClock) -> None:
    """One replica with a scripted engine, some 100 tokens a second for each request."""
    stores = connect(settings, clock)
    registry = RedisReplicas(stores.nodes, stores.calls, clock)

    def script(request: GenerationRequest) -> list[str]:
        return said(request.messages[-1].content, request.max_tokens or 0)

    scripted = ScriptedEngine(script=script, clock=clock, step_s=0.01, models=(MODEL,))
    engine = MeteredEngine(scripted, clock, slots=64)
    secret = settings.cluster_secret.get_secret_value().encode()
    server = TokenLinkServer(engine, secret, name, clock, SystemEntropy())
    await server.start(HOST)
    while True:
        report = ReplicaReport(server.load(), "ready", "", clock.now_ms(), engine.take_news())
        try:
            await registry.announce(report)
        except StoreUnavailableError:
            continue
        await clock.sleep(REPORT_S)


async def dispatcher(settings: Settings, name: str, clock: OffsetClock) -> None:
    """One webhook dispatcher."""
    stores, http = connect(settings, clock), guarded_http(settings)
    await dispatcher_of(settings, stores, http, clock, NamedEntropy(name)).run()


ROLES: dict[str, Callable[[Settings, str, OffsetClock], Awaitable[None]]] = {
    "executor": executor,
    "model": model,
    "dispatcher": dispatcher,
}


@dataclass
class Cast:
    """The process that the others are forked from."""

    process: asyncio.subprocess.Process
    log_dir: Path
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def begin(cls, log_dir: Path) -> "Cast":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.chaos.processes"),
            cwd=Path(__file__).parents[3],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return cls(process, log_dir)

    async def fork(self, role: str, name: str, settings: dict[str, Any], offset_ms: int) -> int:
        """Start one; its pid."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        log = str(self.log_dir / f"{name}.log")
        order = {"role": role, "name": name, "settings": settings, "offset_ms": offset_ms}
        async with self._turn:
            self.process.stdin.write(json.dumps({**order, "log": log}).encode() + b"\n")
            return int(await self.process.stdout.readline())

    async def end(self) -> None:
        """End them all."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()


def play(order: dict[str, Any]) -> None:
    """Be one process, until it is killed; SIGTERM ends it in order."""
    configure_logging("INFO", json=True, path=Path(order["log"]))
    settings = Settings(**order["settings"])
    clock = OffsetClock(order["offset_ms"])

    async def run() -> None:
        task = asyncio.ensure_future(ROLES[order["role"]](settings, order["name"], clock))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    asyncio.run(run())


def main() -> None:
    """Fork a process for every line; with the last line all end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that none stays as a zombie
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(0)
        try:
            play(json.loads(line))
        except BaseException:
            logger.exception("it ended by itself")
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()

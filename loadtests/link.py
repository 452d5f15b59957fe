"""What a token costs on its way from a replica's process to its caller's.

Run it as `python -m loadtests.link` from the root of the repository; it takes about a minute. Each
transport carries the same streams between two processes of this machine, once as fast as it can
(`unpaced`) and once with a step every 5 ms (`paced`, the rhythm of a decoding engine). Ray's rows:
`plain` yields each chunk, `drained` yields what is ready. `local` is an async generator in one
process: the price of Python alone. Ratios are to `local`. CPU counts the two processes, not Ray's
own.
"""

import asyncio
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.tcp_link_server import TokenLinkServer
from serve_app.core.grants import sign_grant
from serve_app.core.inference import Chunk, GenerationRequest, Message
from tests.support.scripted_engine import ScriptedEngine

STREAM_COUNT = 32
TOKEN_COUNT = {"unpaced": 1000, "paced": 300}
STEP_S = {"unpaced": 0.0, "paced": 0.005}
TEXT = " token"
SECRET = b"only for this run"

Stream = Callable[[str, int], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    transport: str
    pace: str
    tokens_per_s: float
    cpu_us: float
    first_ms: float


async def tokens(pace: str) -> AsyncIterator[Chunk]:
    """The streams' content, made on the spot."""
    for index in range(TOKEN_COUNT[pace]):
        await asyncio.sleep(STEP_S[pace])
        yield Chunk(TEXT, (index,))


async def drained(pace: str) -> AsyncIterator[list[Chunk]]:
    """The same, but whatever is ready in one piece."""
    ready: list[Chunk] = []
    is_ready = asyncio.Event()

    async def produce() -> None:
        async for chunk in tokens(pace):
            ready.append(chunk)
            is_ready.set()

    producer = asyncio.create_task(produce())
    sent = 0
    while sent < TOKEN_COUNT[pace]:
        await is_ready.wait()
        is_ready.clear()
        piece, ready[:] = ready[:], []
        sent += len(piece)
        yield piece
    await producer


class Meter:
    """Times the streams of one run and the CPU of the processes that took part."""

    def __init__(self, pids: tuple[int, ...]) -> None:
        self._processes = [psutil.Process(pid) for pid in (os.getpid(), *pids)]
        self._first_s: list[float] = []
        self._start_s = 0.0

    def first(self) -> None:
        """Note a stream's first token."""
        self._first_s.append(time.perf_counter() - self._start_s)

    async def measure(self, transport: str, pace: str, stream: Stream) -> Row:
        """Run all streams at once."""
        await stream(pace, -1)  # warm: connections, code paths
        self._first_s.clear()
        cpu_s = self._cpu_s()
        self._start_s = time.perf_counter()
        counts = await asyncio.gather(*(stream(pace, index) for index in range(STREAM_COUNT)))
        wall_s = time.perf_counter() - self._start_s
        cpu_s = self._cpu_s() - cpu_s
        total = sum(counts)
        assert total == STREAM_COUNT * TOKEN_COUNT[pace], f"{transport} lost tokens"
        first_ms = 1000 * sorted(self._first_s)[len(self._first_s) // 2]
        return Row(transport, pace, total / wall_s, 1e6 * cpu_s / total, first_ms)

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)


async def measure_local() -> list[Row]:
    """The generator in this process."""
    meter = Meter(())

    async def stream(pace: str, _: int) -> int:
        count = 0
        async for _chunk in tokens(pace):
            if count == 0:
                meter.first()
            count += 1
        return count

    return [await meter.measure("local", pace, stream) for pace in STEP_S]


def serve_link(pipe: Connection) -> None:
    """The replica's process: one scripted engine per pace behind a link each."""

    async def run() -> None:
        clock = SystemClock()
        ports = {}
        servers = []
        for pace, step_s in STEP_S.items():
            engine = ScriptedEngine(
                script=lambda request: [TEXT] * (request.max_tokens or 0),
                clock=clock if step_s else None,
                step_s=step_s,
            )
            server = TokenLinkServer(engine, SECRET, "replica", clock, SystemEntropy())
            await server.start()
            servers.append(server)
            ports[pace] = server.port
        pipe.send(ports)
        await asyncio.to_thread(pipe.recv)
        for server in servers:
            await server.close()

    asyncio.run(run())


async def measure_link() -> list[Row]:
    """The token link to a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_link, args=(theirs,))
    process.start()
    ports = await asyncio.to_thread(ours.recv)
    meter = Meter((process.pid or 0,))
    clock = SystemClock()
    link = TcpTokenLink(SECRET, clock, SystemEntropy())

    async def stream(pace: str, index: int) -> int:
        request_id = f"{pace} {index}"
        endpoint = ("replica", "127.0.0.1", ports[pace])
        grant = sign_grant(SECRET, request_id, endpoint, clock.now_ms() + 60_000)
        request = GenerationRequest(
            request_id, (Message("user", "go"),), max_tokens=TOKEN_COUNT[pace]
        )
        count = 0
        async for chunk in link.generate(grant, request):
            if count == 0:
                meter.first()
            count += len(chunk.token_ids)
        return count

    try:
        return [await meter.measure("link", pace, stream) for pace in STEP_S]
    finally:
        await link.close()
        ours.send("stop")
        process.join()


async def measure_ray() -> list[Row]:
    """A Ray Serve handle with `stream=True`, with Serve's fast settings."""
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray  # noqa: PLC0415 - it reads its environment when imported
    from ray import serve  # noqa: PLC0415

    @serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.1})
    class Replica:
        async def pid(self) -> int:
            return os.getpid()

        async def plain(self, pace: str) -> AsyncIterator[Chunk]:
            async for chunk in tokens(pace):
                yield chunk

        async def drained(self, pace: str) -> AsyncIterator[list[Chunk]]:
            async for piece in drained(pace):
                yield piece

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(proxy_location="Disabled")
        handle = await asyncio.to_thread(serve.run, Replica.bind(), name="link", route_prefix=None)
        return await measure_handle(handle)
    finally:
        await asyncio.to_thread(serve.shutdown)
        ray.shutdown()


async def measure_handle(handle: Any) -> list[Row]:
    """Both kinds of streams through a handle of the deployment above."""
    meter = Meter((await handle.pid.remote(),))

    async def plain(pace: str, _: int) -> int:
        count = 0
        async for _chunk in handle.options(stream=True).plain.remote(pace):
            if count == 0:
                meter.first()
            count += 1
        return count

    async def in_pieces(pace: str, _: int) -> int:
        count = 0
        async for piece in handle.options(stream=True).drained.remote(pace):
            if count == 0:
                meter.first()
            count += len(piece)
        return count

    kinds: dict[str, Stream] = {"ray plain": plain, "ray drained": in_pieces}
    return [
        await meter.measure(name, pace, stream) for name, stream in kinds.items() for pace in STEP_S
    ]


def print_table(rows: list[Row]) -> None:
    """The rows with their ratios to `local`."""
    base = {row.pace: row for row in rows if row.transport == "local"}
    print(f"{STREAM_COUNT} streams; {TOKEN_COUNT} tokens each; ratios to local")
    print(f"{'transport':<12} {'pace':<8} {'tokens/s':>9} {'ratio':>6} {'CPU us':>7} "
          f"{'ratio':>6} {'first ms':>9}")  # fmt: skip
    for row in sorted(rows, key=lambda row: row.pace, reverse=True):
        local = base[row.pace]
        print(
            f"{row.transport:<12} {row.pace:<8} {row.tokens_per_s:>9.0f} "
            f"{row.tokens_per_s / local.tokens_per_s:>6.2f} {row.cpu_us:>7.1f} "
            f"{row.cpu_us / local.cpu_us:>6.2f} {row.first_ms:>9.1f}"
        )


async def main() -> None:
    """Measure all and print."""
    rows = await measure_local()
    rows += await measure_link()
    rows += await measure_ray()
    print_table(rows)


if __name__ == "__main__":
    asyncio.run(main())

"""What a signed, durable, recorded delivery costs beside a bare POST, and who waits for whom.

Run it as `python -m loadtests.webhooks` from the root of the repository; it takes about two minutes
and needs neither Ray nor a model. One receiver (a process of its own) answers all.

`bare` posts the same bodies to the same receiver with a plain aiohttp client: no signature, no
store, nothing remembered. `dispatcher` takes them from an embedded Valkey (`appendfsync always`),
signs, sends and records each. Both have one process and the same bound on what is under way; they
take turns. CPU counts that process alone.

`fairness` paces events to 50 healthy endpoints and measures from a delivery's acceptance by the
store to its first byte at the receiver, with and without an endpoint that hangs with a long queue.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from deployments.webhooks import dispatcher_of, guarded_http, webhooks_of
from serve_app.adapters.redis_connect import RedisConnections, connect
from serve_app.adapters.redis_deliveries import RedisDeliveries
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from serve_app.core.webhooks import event, event_id
from serve_app.services.deliveries import Dispatcher
from serve_app.services.endings import deliver
from serve_app.services.webhooks import WebhookWish
from serve_app.settings import Settings

ROUNDS = 3
DELIVERIES = 5000
ENDPOINTS = 50
INFLIGHT = 64
PER_SECOND = 200
SECONDS = 8
BACKLOG = 100_000
ACCEPT_BATCH = 256
PARTITIONS = 16
WARM_SECONDS = 2.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Receiver(asyncio.Protocol):
    """Counts requests and answers at once, or, under /hang, never."""

    def __init__(self, count: "Synchronized[int]", firsts: dict[bytes, float]) -> None:
        self._count = count
        self._firsts = firsts
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        now = time.time()
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self._data) < end + 4 + length:
                return
            self._data = self._data[end + 4 + length :]
            if head.startswith(b"post /hang"):
                return
            at = head.find(b"webhook-id:")
            if at >= 0:
                self._firsts.setdefault(head[at + 11 :].split(b"\r\n", 1)[0].strip(), now)
            self._count.value += 1
            self._transport.write(OK)


def receive(pipe: Connection, count: "Synchronized[int]") -> None:
    """The receiver's process: its port goes out, and its arrivals when asked."""

    async def main() -> None:
        firsts: dict[bytes, float] = {}
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Receiver(count, firsts), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        while await loop.run_in_executor(None, pipe.recv):
            pipe.send({name.decode(): at for name, at in firsts.items()})
            firsts.clear()

    uvloop.run(main())


class Bench:
    """A store, a receiver and webhooks."""

    def __init__(self, settings: Settings, port: int, pipe: Connection, count: Any) -> None:
        self.settings, self.port, self.pipe, self.count = settings, port, pipe, count
        self.clock, self.entropy = SystemClock(), SystemEntropy()
        self.stores: RedisConnections = connect(settings, self.clock)
        self.queue = RedisDeliveries(self.stores.calls, PARTITIONS)
        self.webhooks = webhooks_of(settings, self.stores.calls, self.clock, self.entropy)

    async def endpoints(self, path: str, count: int) -> list[Any]:
        """New webhooks, all at the receiver."""
        wishes = [
            WebhookWish(
                url=f"http://127.0.0.1:{self.port}{path}?{n}", events=["*"], modes=["async"]
            )
            for n in range(count)
        ]
        return [(await self.webhooks.create("bench", wish)).webhook for wish in wishes]

    async def accept(self, webhook: Any, number: int) -> tuple[str, float]:
        """Put one delivery in, as the relay does; its event and when it was accepted."""
        an_id = event_id(f"exe_00{self.entropy.token()}{number}")
        await self.queue.accept(
            deliver(webhook, an_id, "workflow.completed", body_of(an_id, number), PARTITIONS)
        )
        return an_id.lower(), time.time()

    async def fill(self, webhooks: list[Any], count: int) -> None:
        """Queue so many deliveries, over all of these."""
        for start in range(0, count, ACCEPT_BATCH):
            numbers = range(start, min(start + ACCEPT_BATCH, count))
            await asyncio.gather(*(self.accept(webhooks[n % len(webhooks)], n) for n in numbers))

    @asynccontextmanager
    async def dispatcher(self) -> AsyncIterator[Dispatcher]:
        """As the deployment runs it."""
        stores, http = connect(self.settings, self.clock), guarded_http(self.settings)
        dispatcher = dispatcher_of(self.settings, stores, http, self.clock, self.entropy)
        task = asyncio.ensure_future(dispatcher.run())
        yield dispatcher
        task.cancel()
        await asyncio.wait((task,))
        await http.close()
        await stores.close()

    async def arrivals(self) -> dict[str, float]:
        """When the events came that came since the last time."""
        self.pipe.send("arrivals")
        return dict(await asyncio.get_running_loop().run_in_executor(None, self.pipe.recv))


def body_of(an_id: str, number: int) -> bytes:
    """An event of some 600 bytes."""
    data = {"executionId": f"exe_{number:032}", "workflowId": "bench", "output": "x" * 300,
            "error": None, "metadata": {"order": number},
            "usage": {"promptTokens": 12, "completionTokens": 34, "totalTokens": 46}}  # fmt: skip
    return json.dumps(event(an_id, "workflow.completed", 1_763_700_000_000, data)).encode()


async def bare_round(bench: Bench, count: int) -> tuple[float, float]:
    """Deliveries/s and CPU µs of each."""
    url, left = f"http://127.0.0.1:{bench.port}/hook", iter(range(count))

    async def caller(session: aiohttp.ClientSession) -> None:
        for number in left:
            async with session.post(url, data=body_of(f"evt_{number}", number)) as answer:
                await answer.read()

    connector = aiohttp.TCPConnector(limit=INFLIGHT)
    async with aiohttp.ClientSession(connector=connector) as session:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*(caller(session) for _ in range(INFLIGHT)))
        return _figures(count, began_s, cpu_s)


async def dispatch_round(bench: Bench, webhooks: list[Any], count: int) -> tuple[float, float]:
    """As `bare_round`, from the queue; it is filled before the clock starts."""
    await bench.fill(webhooks, count)
    target = bench.count.value + count
    async with bench.dispatcher() as dispatcher:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        while bench.count.value < target or dispatcher.flying:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.01)
        return _figures(count, began_s, cpu_s)


def _figures(count: int, began_s: float, cpu_s: float) -> tuple[float, float]:
    wall_s, used_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return count / wall_s, used_s / count * 1e6


async def paced(bench: Bench, webhooks: list[Any], seconds: float) -> list[float]:
    """Latencies in ms, from acceptance to first byte, of events at a steady pace."""
    accepted: list[asyncio.Task[tuple[str, float]]] = []
    began_s = time.perf_counter()
    for number in range(int(PER_SECOND * seconds)):
        await asyncio.sleep(max(0.0, began_s + number / PER_SECOND - time.perf_counter()))
        accept = bench.accept(webhooks[number % len(webhooks)], number)
        accepted.append(asyncio.ensure_future(accept))
    sent = dict(await asyncio.gather(*accepted))
    give_up_s, arrived = time.perf_counter() + 30, {}
    while len(arrived) < len(sent) and time.perf_counter() < give_up_s:
        await asyncio.sleep(0.2)
        arrived |= {name: at for name, at in (await bench.arrivals()).items() if name in sent}
    print(f"  events {len(sent)}, arrived {len(arrived)}")
    return sorted((at - sent[name]) * 1000 for name, at in arrived.items())


def _percentiles(values: list[float]) -> str:
    at = {q: values[min(len(values) - 1, int(len(values) * q))] for q in (0.5, 0.99)}
    return f"p50 {at[0.5]:.1f} ms, p99 {at[0.99]:.1f} ms, max {values[-1]:.1f} ms"


async def throughput(bench: Bench, rounds: int, count: int) -> None:
    """The table of the two arms."""
    webhooks = await bench.endpoints("/hook", ENDPOINTS)
    await bare_round(bench, count // 5)
    await dispatch_round(bench, webhooks, count // 5)
    rows: dict[str, list[tuple[float, float]]] = {"bare": [], "dispatcher": []}
    for number in range(rounds):
        for arm in sorted(rows, reverse=bool(number % 2)):
            round_ = bare_round(bench, count) if arm == "bare" else None
            rows[arm].append(await (round_ or dispatch_round(bench, webhooks, count)))
    for arm, figures in rows.items():
        rates, costs = zip(*figures, strict=True)
        print(f"  {arm:10} {statistics.median(rates):7.0f}/s ({min(rates):.0f}-{max(rates):.0f}),"
              f" {statistics.median(costs):.0f} CPU us each")  # fmt: skip
    ratios = [d[0] / b[0] for d, b in zip(rows["dispatcher"], rows["bare"], strict=True)]
    shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"  ratio {shown}")


async def fairness(bench: Bench, backlog: int) -> None:
    """Healthy endpoints' latency without and with the one that hangs."""
    healthy = await bench.endpoints("/hook", ENDPOINTS)
    async with bench.dispatcher():
        await paced(bench, healthy, WARM_SECONDS)
        print(f"  alone:      {_percentiles(await paced(bench, healthy, SECONDS))}")
    (slow,) = await bench.endpoints("/hang", 1)
    began_s = time.perf_counter()
    await bench.fill([slow], backlog)
    print(
        f"  {backlog} deliveries queued for one endpoint in {time.perf_counter() - began_s:.1f} s"
    )
    async with bench.dispatcher():
        await paced(bench, healthy, WARM_SECONDS)
        print(f"  with it:    {_percentiles(await paced(bench, healthy, SECONDS))}")


async def run(arguments: argparse.Namespace) -> None:
    """Both benches over one store and one receiver."""
    count = multiprocessing.get_context("spawn").Value("q", 0)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=receive, args=(theirs, count), daemon=True)
    process.start()
    port = ours.recv()
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddedValkey(Path(folder), SystemClock(), SystemEntropy())
        await store.start()
        settings = Settings(
            redis_url=store.url,
            data_dir=Path(folder),
            cluster_secret="a secret of the bench",
            egress_allow=("127.0.0.1/32",),
            partitions=PARTITIONS,
            webhook_inflight_max=INFLIGHT,
            webhooks_max=1000,
        )
        bench = Bench(settings, port, ours, count)
        print(f"throughput: {ENDPOINTS} endpoints, {INFLIGHT} under way, {arguments.rounds} rounds")
        await throughput(bench, arguments.rounds, arguments.deliveries)
        print(f"fairness: {PER_SECOND} events/s to {ENDPOINTS} endpoints for {SECONDS} s")
        await fairness(bench, arguments.backlog)
        await bench.stores.close()
        await store.stop()
    ours.send("")
    process.join(5)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--deliveries", type=int, default=DELIVERIES)
    parser.add_argument("--backlog", type=int, default=BACKLOG)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()

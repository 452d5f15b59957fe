"""What finished executions take in the store, and how fast they are listed and opened.

Run it as `python -m loadtests.retention` from the root of the repository; with its default of
100,000 executions it takes some minutes. Each is a chat: an input of three messages, one generate
step whose answer of 120 tokens came in ten chunks, and the result. They are made through the store
adapter, as an executor commits them, on an embedded Valkey of their own and, with `--cluster`, on
one of three primaries on this machine.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from loadtests.service import machine
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_store import RedisStore
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from serve_app.core.execution import (
    ChunkEmitted,
    Event,
    Execution,
    ExecutionCompleted,
    ExecutionCreated,
    ExecutionStarted,
    StepCompleted,
    StepStarted,
    evolve,
)
from serve_app.core.inference import Usage
from serve_app.core.journal import Commit, Committed, execution_id
from serve_app.ports import ListQuery
from tests.support.valkey_cluster import ValkeyCluster, raw_client

PARTITIONS = 16
CONCURRENCY = 256
CHUNKS, TOKENS = 10, 12
WORKER = "127.0.0.1:41234~AbCdEfGhIjKlMnOpQrStUv"  # as long as a real one
WORDS = ("Paris", "is", "the", "capital", "of", "France", "and", "its", "largest", "city")
WORKFLOWS = ("chat-assistant", "sentiment-analysis", "data-extraction")
LOOKS = 200
PAGE = 50
FAR_MS = 86_400_000


def created(number: int, now_ms: int) -> ExecutionCreated:
    """An execution of one of three workflows; one a millisecond."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant. Answer in a few sentences."},
        {"role": "user", "content": f"Question {number}: what is the capital of France?"},
        {"role": "assistant", "content": "Let me think about that for a moment."},
    ]
    wish = {"messages": messages, "temperature": 0}
    workflow_id = WORKFLOWS[number % len(WORKFLOWS)]
    return ExecutionCreated(
        now_ms + number, "default", workflow_id, 1, wish, user_id=f"user-{number % 1000}",
        timeout_ms=3_600_000,
    )  # fmt: skip


def rounds(at_ms: int) -> list[tuple[Event, ...]]:
    """The commits of its worker."""
    answer = " ".join(WORDS[i % len(WORDS)] for i in range(CHUNKS * TOKENS))
    text = answer[: len(answer) // CHUNKS]
    ids = tuple(random.randrange(49152) for _ in range(TOKENS))
    chunks = [(ChunkEmitted(at_ms, "answer", text, ids),) for _ in range(CHUNKS)]
    usage = Usage(60, CHUNKS * TOKENS, 0)
    end = (StepCompleted(at_ms, "answer", answer, usage), ExecutionCompleted(at_ms, answer))
    return [(ExecutionStarted(at_ms), StepStarted(at_ms, "answer", 1)), *chunks, end]


class Bench:
    """One store, filled and asked."""

    def __init__(self, url: str) -> None:
        self.client: Any = raw_client(url)
        self.calls = RedisCalls(RedisNodes(RedisOptions(tuple(url.split(",")))), SystemClock())
        self.store = RedisStore(
            self.calls,
            partition_count=PARTITIONS,
            backlog_max=10**9,
            retention_ms=FAR_MS,
        )
        self.ids: list[str] = []

    async def fill(self, count: int) -> float:
        """Run so many executions; commits a second."""
        now_ms = int(time.time() * 1000)
        for partition in range(PARTITIONS):
            await self.store.heartbeat(partition, WORKER, FAR_MS, 10**6)
        numbers = iter(range(count))
        begin_s = time.perf_counter()
        await asyncio.gather(*(self._fill(numbers, now_ms) for _ in range(CONCURRENCY)))
        return count * (2 + len(rounds(0))) / (time.perf_counter() - begin_s)

    async def _fill(self, numbers: Any, now_ms: int) -> None:
        for number in numbers:
            new_id = execution_id(number % PARTITIONS, f"{number:022d}")
            accepted = await self.store.create(new_id, created(number, now_ms), "create", "ingress")
            key = f"ip:{{{number % PARTITIONS}}}:s:{new_id}"
            token = (await self.calls.call("HGET", key, "owner")).decode()
            await self._drive(accepted.execution, token, now_ms + number)
            self.ids.append(new_id)

    async def _drive(self, execution: Execution, token: str, at_ms: int) -> None:
        for number, events in enumerate(rounds(at_ms)):
            after = execution
            for event in events:
                after = evolve(after, event)
            commit = Commit(f"{token}.{number}", token, execution, after, events)
            answer = await self.store.commit(commit)
            assert isinstance(answer, Committed), answer
            execution = after

    async def memory(self, count: int) -> dict[str, float]:
        """Bytes of each execution, by what holds them."""
        parts: defaultdict[str, float] = defaultdict(float)
        for one in random.sample(self.ids, LOOKS):
            for kind, name in (("s", "snapshot"), ("j", "journal"), ("b", "payloads")):
                key = f"ip:{{{int(one[4:6], 16)}}}:{kind}:{one}"
                parts[name] += (await self.client.memory_usage(key, samples=0) or 0) / LOOKS
        for pattern, name in (("ip:*:ix:*", "indexes"), ("ip:*:ends", "expiry index")):
            async for key in self.client.scan_iter(pattern, count=1000):
                parts[name] += await self.client.memory_usage(key, samples=0) / count
        return parts

    async def used(self) -> int:
        """Memory of all servers."""
        info = await self.client.info("memory")
        rows = info.values() if "used_memory" not in info else (info,)
        return sum(int(row["used_memory"]) for row in rows)

    async def close(self) -> None:
        """Disconnect."""
        await self.calls.close()
        await self.client.aclose()


async def timed(look: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Median and 99th percentile, in ms."""
    took = []
    for _ in range(LOOKS):
        begin_s = time.perf_counter()
        await look()
        took.append(1000 * (time.perf_counter() - begin_s))
    return statistics.median(took), statistics.quantiles(took, n=100)[98]


async def measure(name: str, url: str, count: int) -> None:
    """Fill one store and print its figures."""
    bench = Bench(url)
    empty = await bench.used()
    rate = await bench.fill(count)
    parts = await bench.memory(count)
    whole = (await bench.used() - empty) / count
    print(f"\n{name}: {count} executions, {rate:.0f} calls/s while they ran")
    print("\n| bytes of each | |\n| --- | --- |")
    for part, size in parts.items():
        print(f"| {part} | {size:.0f} |")
    print(f"| all, by the server's own count | {whole:.0f} |")
    store, [middle] = bench.store, await bench.store.recent(ListQuery("default", limit=1))
    deep = (middle.created.at_ms - count * 9 // 10, "")
    looks: dict[str, Callable[[], Awaitable[object]]] = {
        "first page": lambda: store.recent(ListQuery("default", limit=PAGE)),
        "page after 90 %": lambda: store.recent(ListQuery("default", before=deep, limit=PAGE)),
        "first page of a workflow": lambda: store.recent(
            ListQuery("default", workflow_id=WORKFLOWS[1], limit=PAGE)
        ),
        "page of a workflow and a status": lambda: store.recent(
            ListQuery("default", workflow_id=WORKFLOWS[1], status="completed", limit=PAGE)
        ),
        "open one": lambda: store.load(random.choice(bench.ids)),
        "read its journal": lambda: store.read(random.choice(bench.ids), 0, 1000),
    }
    print(f"\n| {PAGE} a page | median ms | p99 ms |\n| --- | --- | --- |")
    for title, look in looks.items():
        median, high = await timed(look)
        print(f"| {title} | {median:.2f} | {high:.2f} |")
    await bench.close()


async def commit_cost(name: str, url: str, count: int) -> None:
    """What a commit costs alone and in a crowd."""
    bench = Bench(url)
    rate = await bench.fill(count)
    lone = await timed(lambda: bench.store.heartbeat(0, WORKER, FAR_MS, 1))
    print(f"| {name} | {lone[0]:.2f} | {rate:.0f} |")
    await bench.close()


async def main() -> None:
    """Fill, weigh, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--compare", type=int, default=5_000, help="executions for each store")
    wanted = parser.parse_args()
    print(machine())
    async with AsyncExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ip-load-")))
        if wanted.count:
            server = EmbeddedValkey(
                base / "large", SystemClock(), SystemEntropy(), fsync="everysec"
            )
            async with server:
                await measure("one server", server.url, wanted.count)
        if wanted.compare:
            print("\n| store, fsync always | one call, ms | calls/s of 256 at once |")
            print("| --- | --- | --- |")
            async with EmbeddedValkey(base / "one", SystemClock(), SystemEntropy()) as one:
                await commit_cost("one server", one.url, wanted.compare)
            cluster = ValkeyCluster(base / "three")
            stack.push_async_callback(cluster.stop)
            await cluster.start()
            await commit_cost("cluster of three on the same two cores", cluster.url, wanted.compare)


if __name__ == "__main__":
    asyncio.run(main())

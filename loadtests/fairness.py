"""What a workspace with few executions waits behind one that has queued thousands, and its price.

Run it as `python -m loadtests.fairness` from the root of the repository; it takes about half a
minute. On an embedded Valkey of its own one workspace queues 10,000 executions and another sends
100, one for each 20 that are served; a worker claims batches of eight. Waits are counted in
executions served meanwhile, so they do not depend on the machine. `one line` puts all of them into
one workspace, whose line is by age: a queue without turns. The rates are of calls through the store
adapter: starts that go straight to a worker, and starts that stand in line and are claimed.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from loadtests.service import machine
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_store import RedisStore
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from serve_app.core.execution import ExecutionCreated
from serve_app.core.journal import execution_id
from tests.support.valkey_cluster import flush

HEAVY, LIGHT = "heavy", "light"
EVERY = 20  # executions served between two of the light workspace
BATCH = 8
CONCURRENCY = 64
WORKER = "127.0.0.1:41234~fairness"
LEASE_MS = 600_000


async def queue(store: RedisStore, workspace: str, first: int, count: int) -> list[str]:
    """Accept executions in partition 0; their ids."""
    ids = [execution_id(0, f"{workspace}{number:08}") for number in range(first, first + count)]
    limit = asyncio.Semaphore(CONCURRENCY)
    now_ms = SystemClock().now_ms()

    async def one(an_id: str) -> None:
        async with limit:
            created = ExecutionCreated(now_ms, workspace, "wf", 1, {"text": "hello"})
            await store.create(an_id, created, f"create/{an_id}", "")

    await asyncio.gather(*(one(an_id) for an_id in ids))
    return ids


async def waits(store: RedisStore, light: str, queued: int, sent: int) -> list[int]:
    """Executions served between the acceptance of each light one and its own claim."""
    await queue(store, HEAVY, 0, queued)
    served, since, found = 0, {}, []
    while len(found) < sent:
        if len(since) < sent and served >= EVERY * len(since):
            (an_id,) = await queue(store, light, 10_000_000 + len(since), 1)
            since[an_id] = served
        for owned in await store.claim(0, WORKER, BATCH):
            if owned.execution.id in since:
                found.append(served - since[owned.execution.id])
            served += 1
    return found


async def rates(store: RedisStore, url: str, count: int) -> tuple[float, float, float]:
    """Starts a second that go straight to a worker; that stand in line; claims a second."""
    await flush(url)
    await store.heartbeat(0, WORKER, LEASE_MS, 10 * count)
    began = time.perf_counter()
    await queue(store, HEAVY, 0, count)
    eager_s = time.perf_counter() - began
    await flush(url)
    began = time.perf_counter()
    for first, workspace in enumerate((HEAVY, LIGHT)):
        await queue(store, workspace, first * count, count // 2)
    queued_s = time.perf_counter() - began
    began = time.perf_counter()
    while await store.claim(0, WORKER, 64):
        pass
    claim_s = time.perf_counter() - began
    return count / eager_s, count / queued_s, count / claim_s


def percentile(values: list[int], share: float) -> int:
    """The value below which that share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def main(queued: int, sent: int, rounds: int) -> None:
    """Measure and print."""
    clock = SystemClock()
    print(machine())
    with tempfile.TemporaryDirectory() as data_dir:
        server = EmbeddedValkey(Path(data_dir), clock, SystemEntropy())
        await server.start()
        calls = RedisCalls(RedisNodes(RedisOptions((server.url,))), clock)
        store = RedisStore(calls, partition_count=1, backlog_max=10**6, retention_ms=600_000)
        try:
            for name, light in (("turns", LIGHT), ("one line", HEAVY)):
                await flush(server.url)
                found = await waits(store, light, queued, sent)
                middle, late = percentile(found, 0.5), percentile(found, 0.95)
                print(
                    f"{name}: {sent} executions behind {queued}: p50 {middle}, p95 {late}, most "
                    f"{max(found)} executions served before"
                )
            measured = [await rates(store, server.url, 4_000) for _ in range(rounds)]
            for name, values in zip(
                ("starts, straight to a worker", "starts, in line", "claims"),
                zip(*measured, strict=True),
                strict=True,
            ):
                each = ", ".join(f"{value:.0f}" for value in values)
                print(f"{name}: {statistics.median(values):.0f}/s ({each})")
        finally:
            await calls.close()
            await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--sent", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(main(options.queued, options.sent, options.rounds))

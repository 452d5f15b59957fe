"""Three no-op steps as one workflow: how many a second, how fast, and for how much CPU.

Run it as `python -m loadtests.workflows` from the root of the repository; it takes about 100 s.
`c=1` and `c=64` wait for the result (`POST /v1/execute`); start/s and done/s submit a batch by
`POST /v1/execute/async` from 64 callers and count until the last is done. Restate's line is a fixed
reference and was not run here. The three steps are pure (`echo`), so they share one commit: this
measures accepting, handing over, deciding, recording and answering, not three separate writes.
"""

import asyncio
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import redis
import uvloop

from loadtests.http_client import Connection, Timings, closed_loop
from loadtests.service import (
    CallCpu,
    CpuMeter,
    Target,
    execute_body,
    machine,
    middle_parts,
    spread,
    tiny_service,
)
from serve_app.adapters.redis_index import partition_key
from serve_app.settings import Settings

ROUNDS = 3
SECONDS = 4.0
CALLERS = 64
BATCH = 46 * CALLERS
BATCH_WITHIN_S = 60.0
DEFINITION = """\
id: three-no-ops
steps:
  - {id: one, echo: {}}
  - {id: two, echo: {}}
  - {id: three, echo: {}}
"""
BODY = execute_body("three-no-ops", {"message": "hello world"})
COLUMNS = (
    "service",
    "c=1 p50 / p99 ms",
    "c=64 per s",
    "c=64 p50 / p99 ms",
    "CPU ms",
    "start/s",
    "done/s",
)
RESTATE = (
    "| Restate 1.7: published here earlier, same kind of machine "
    "| 8.76 / 13.22 | 517.9 | - / 215.94 | 3.28 | 2225.4 | 598.8 |"
)


@dataclass(slots=True)
class Results:
    """What all rounds gave."""

    alone: list[Timings] = field(default_factory=list)
    loaded: list[Timings] = field(default_factory=list)
    alone_cpu: list[CallCpu] = field(default_factory=list)
    loaded_cpu: list[CallCpu] = field(default_factory=list)
    starts_per_s: list[float] = field(default_factory=list)
    done_per_s: list[float] = field(default_factory=list)


class DoneCount:
    """How many executions have ended well: read past the API, which would be load itself."""

    def __init__(self, target: Target) -> None:
        assert target.data_dir is not None, "a service of our own has a known directory"
        endpoint = json.loads((target.data_dir / "valkey" / "endpoint.json").read_bytes())
        self._client = redis.Redis.from_url(endpoint["url"])
        workspace = Settings.model_fields["workspace_id"].default
        self._keys = [
            f"{partition_key(partition)}:ix:{workspace}:st:completed"
            for partition in range(Settings.model_fields["partitions"].default)
        ]

    def read(self) -> int:
        """The count now."""
        with self._client.pipeline(transaction=False) as pipeline:
            for key in self._keys:
                pipeline.zcard(key)
            return sum(pipeline.execute())

    def wait(self, count: int) -> None:
        """Return when there are so many."""
        give_up_s = time.perf_counter() + BATCH_WITHIN_S
        while self.read() < count:
            assert time.perf_counter() < give_up_s, f"{self.read()} of {count} are done"
            time.sleep(0.01)


async def execute_for(target: Target, callers: int, seconds: float) -> Timings:
    """Callers that wait for each result."""
    connections = [target.connection() for _ in range(callers)]

    async def call(caller: int) -> bool:
        status, body = await connections[caller].request("POST", "/v1/execute", BODY)
        return status == 200 and b'"status":"completed"' in body

    try:
        return await closed_loop(callers, seconds, call)
    finally:
        for connection in connections:
            connection.close()


async def start_batch(target: Target) -> None:
    """Submit the batch."""
    connections = [target.connection() for _ in range(CALLERS)]

    async def caller(connection: Connection) -> None:
        for _ in range(BATCH // CALLERS):
            status, body = await connection.request("POST", "/v1/execute/async", BODY)
            assert status == 202, body

    try:
        await asyncio.gather(*(caller(connection) for connection in connections))
    finally:
        for connection in connections:
            connection.close()


def measure(target: Target, meter: CpuMeter) -> Results:
    """All rounds, the arms taking turns."""
    results, done = Results(), DoneCount(target)
    uvloop.run(execute_for(target, CALLERS, 1.0))  # warm: connections, code paths, caches
    for _ in range(ROUNDS):
        meter.start()
        results.alone.append(uvloop.run(execute_for(target, 1, SECONDS)))
        results.alone_cpu.append(meter.per_call_ms(results.alone[-1].count))
        meter.start()
        results.loaded.append(uvloop.run(execute_for(target, CALLERS, SECONDS)))
        results.loaded_cpu.append(meter.per_call_ms(results.loaded[-1].count))
        before, started_s = done.read(), time.perf_counter()
        uvloop.run(start_batch(target))
        results.starts_per_s.append(BATCH / (time.perf_counter() - started_s))
        done.wait(before + BATCH)
        results.done_per_s.append(BATCH / (time.perf_counter() - started_s))
    return results


def print_table(results: Results) -> None:
    """Our line beside the reference."""
    alone, loaded = results.alone, results.loaded
    cells = [
        f"{spread([one.p50_ms for one in alone])} / {spread([one.p99_ms for one in alone])}",
        spread([one.per_second for one in loaded], digits=0),
        f"{spread([one.p50_ms for one in loaded])} / {spread([one.p99_ms for one in loaded])}",
        spread([one.gross_ms for one in results.loaded_cpu]),
        spread(results.starts_per_s, digits=0),
        spread(results.done_per_s, digits=0),
    ]
    print(f"median of {ROUNDS} rounds (range); CPU: whole service, idle share included\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    print(f"| inferpipe, this run | {' | '.join(cells)} |")
    print(RESTATE)
    print(f"\nerrors: {sum(one.error_count for one in (*alone, *loaded))}")
    for name, calls in (("c=1", results.alone_cpu), ("c=64", results.loaded_cpu)):
        net = spread([call.net_ms for call in calls])
        print(
            f"CPU ms of one workflow at {name}, idle share left out: {net}: {middle_parts(calls)}"
        )


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="ip-load-") as folder:
        (Path(folder) / "three-no-ops.yaml").write_text(DEFINITION, encoding="utf-8")
        with tiny_service(INFERPIPE_WORKFLOWS_DIR=folder) as target:
            meter = CpuMeter(target)
            print(f"{machine()}\n{meter.idle}")
            print_table(measure(target, meter))


if __name__ == "__main__":
    main()

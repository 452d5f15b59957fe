"""The model replica killed in the middle of generations, and generations that are cancelled."""

import asyncio
import time
from collections import Counter
from datetime import datetime

import httpx
import psutil
import pytest

from tests.chaos.conftest import Cluster, Reading, ended, follow, kill, show, spread, start
from tests.support.checker import Entry

EACH = 7
KINDS = ("story", "dice", "form")  # greedy, seeded, structured
CANCELS = 20
pytestmark = pytest.mark.timeout(300)


async def test_kill_of_the_model_replica(cluster: Cluster, http: httpx.AsyncClient) -> None:
    calm = await ended(http, [await start(http, kind) for kind in KINDS])
    ids = [await start(http, kind) for _ in range(EACH) for kind in KINDS]
    await asyncio.sleep(0.3)
    [pid] = cluster.service.replica_pids("model_replica")
    engine = psutil.Process(pid).children(recursive=True)
    killed_s = kill(pid)
    killed_ms = time.time() * 1000
    records = await ended(http, ids, within_s=150)
    took_s = time.monotonic() - killed_s
    journals = cluster.check(*ids)
    assert Counter(record["status"] for record in records) == {"completed": len(ids)}
    assert {record["attempts"] for record in records} == {1}
    assert [e for journal in journals for e in journal if e.kind == "step.retrying"] == []
    cut = [journal for journal in journals if is_cut(journal, killed_ms)]
    assert cut
    # Not a token more or less than in peace, and the same ones.
    expected = {record["workflowId"]: record for record in calm}
    for record in records:
        peaceful = expected[record["workflowId"]]
        assert record["data"] == peaceful["data"]
        assert record["usage"] == peaceful["usage"]
    gaps_s = [gap_ms(journal, killed_ms) / 1000 for journal in cut]
    _, left = psutil.wait_procs(engine, timeout=10)
    assert left == []
    show(
        "kill -9 of the only model replica in the middle of generations",
        {
            "executions": f"{len(ids)} completed, attempts 1 each, step retries 0",
            "answers cut in the middle": len(cut),
            "tokens lost or repeated, texts that differ": "0, 0",
            "gap in their streams": spread(gaps_s, "s"),
            "kill to last end": f"{took_s:.1f} s",
            "engine processes left": len(left),
        },
    )


def chunk_times(journal: list[Entry]) -> list[float]:
    return [float(entry.data["at_ms"]) for entry in journal if entry.kind == "chunk"]


def is_cut(journal: list[Entry], killed_ms: float) -> bool:
    times = chunk_times(journal)
    return bool(times) and times[0] < killed_ms < times[-1]


def gap_ms(journal: list[Entry], killed_ms: float) -> float:
    """From the last chunk before the kill to the first after it."""
    times = chunk_times(journal)
    return min(at for at in times if at > killed_ms) - max(at for at in times if at <= killed_ms)


async def test_cancel_reaches_the_engine(cluster: Cluster, http: httpx.AsyncClient) -> None:
    asked: dict[str, float] = {}
    ended_ms = []
    async with cluster.connect() as caller:
        await caller.get("/v1/health")  # the connection stands before the clock runs
        for _ in range(CANCELS):
            execution_id = await start(http, "saga")
            cancelling: list[asyncio.Task[httpx.Response]] = []

            def seen(
                entry: Entry,
                eid: str = execution_id,
                cancelling: list[asyncio.Task[httpx.Response]] = cancelling,
            ) -> bool:
                if not cancelling and entry.kind == "chunk":
                    asked[eid] = time.time() * 1000
                    post = caller.post(f"/v1/executions/{eid}/cancel")
                    cancelling.append(asyncio.create_task(post))
                return False

            reading = await follow(http, Reading(execution_id), seen=seen)
            ended_ms.append(time.time() * 1000 - asked[execution_id])
            assert (await cancelling[0]).status_code == 202
            assert reading.view[-1].kind == "execution.cancelled"
    aborted_ms = await aborts(cluster, set(asked))
    # One that came between two generations found nothing to abort.
    assert len(aborted_ms) >= CANCELS * 3 // 4
    cluster.check(*asked)
    show(
        "cancel during a generation, from the POST",
        {
            "to the engine's abort": spread(
                [at_ms - asked[one] for one, at_ms in aborted_ms.items()], "ms"
            ),
            "to the terminal event at the reader": spread(ended_ms, "ms"),
        },
    )


async def aborts(cluster: Cluster, execution_ids: set[str]) -> dict[str, float]:
    """When the engine noted the abort of each execution's generation, Unix ms."""
    found: dict[str, float] = {}
    for _ in range(20):
        found = {
            record["request_id"].partition("/")[0]: ms_of(record["ts"])
            for record in cluster.log_records("model")
            if record["message"] == "generation aborted"
        }
        if found.keys() >= execution_ids:
            break
        await asyncio.sleep(0.1)
    return {one: found[one] for one in execution_ids & found.keys()}


def ms_of(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() * 1000

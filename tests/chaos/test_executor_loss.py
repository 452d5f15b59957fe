"""Executors that are killed, or stopped for longer than their lease, in the middle of a step."""

import asyncio
import os
import signal
import time
from collections import Counter
from itertools import cycle

import httpx
import psutil
import pytest

from tests.chaos.conftest import (
    EXECUTORS,
    Cluster,
    Reading,
    ended,
    follow,
    kill,
    show,
    spread,
    start,
)
from tests.support.checker import Entry, view_problems

TRIES = 10
KILLED_AFTER = 3  # chunks
MIDDLE = {"story": "two", "dice": "one", "form": "one"}  # greedy, seeded, structured
STOPPED_S = 5.0  # the lease is 3 s
pytestmark = pytest.mark.timeout(300)


async def test_kill_of_the_owner_in_the_middle_of_an_answer(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    calm = {r["workflowId"]: r for r in await ended(http, [await start(http, w) for w in MIDDLE])}
    take_over_s: list[float] = []
    gaps_s: list[float] = []
    misses = 0
    completions: Counter[int] = Counter()
    kinds = cycle(MIDDLE)
    while len(take_over_s) < TRIES:
        await asyncio.to_thread(cluster.service.wait_healthy, 60)
        kind = next(kinds)
        execution_id = await start(http, kind)
        killing = KillInStep(cluster, execution_id, MIDDLE[kind])
        reading = await follow(http, Reading(execution_id), seen=killing.seen)
        [record] = await ended(http, [execution_id])
        [journal] = cluster.check(execution_id)
        assert view_problems(reading.view, journal) == []
        again = await follow(http, Reading(execution_id))
        assert view_problems(again.view, journal) == []
        done = Counter(e.data["step"] for e in again.view if e.kind == "step.completed")
        assert done == {step["id"]: 1 for step in calm[kind]["steps"]}
        completions.update(done.values())
        # Nothing was made twice: the same text, from as many tokens, and no chunk is void.
        assert (record["data"], record["usage"]) == (calm[kind]["data"], calm[kind]["usage"])
        assert (record["status"], record["attempts"]) == ("completed", 1)
        assert [entry for entry in journal if entry.kind == "step.retrying"] == []
        resumed = [entry for entry in journal if entry.kind == "step.resumed"]
        if not resumed:
            misses += 1  # the step had ended before the signal got there
            assert misses < TRIES, "the middle of an answer is never met"
            continue
        assert "exact" in {step.get("resumed") for step in record["steps"]}
        take_over_s.append(resumed[0].data["at_ms"] / 1000 - killing.killed_s)
        gaps_s.append(gap_s(journal, resumed[0]))
    show(
        f"kill -9 of the owning executor in the middle of an answer, {TRIES} times",
        {
            "kill to take-over": spread(take_over_s, "s"),
            "gap in the stream": spread(gaps_s, "s"),
            "completed": f"{TRIES + misses} of {TRIES + misses}",
            "texts and usage as in peace": "all",
            "tokens made twice, steps retried": "0, 0",
            "steps by times completed": dict(completions),
            "killed too late to meet the step": misses,
        },
    )


def gap_s(journal: list[Entry], resumed: Entry) -> float:
    """From the last chunk before the new owner to its first."""
    times = [(entry.seq, entry.data["at_ms"]) for entry in journal if entry.kind == "chunk"]
    before = max(at for seq, at in times if seq < resumed.seq)
    return (min(at for seq, at in times if seq > resumed.seq) - before) / 1000


class KillInStep:
    """Kills the owner at the third chunk of a step."""

    def __init__(self, cluster: Cluster, execution_id: str, step_id: str) -> None:
        self._cluster = cluster
        self._execution_id = execution_id
        self._step_id = step_id
        self._ports = cluster.executor_ports()
        self._count = 0
        self.killed_s = 0.0  # Unix

    def seen(self, entry: Entry) -> bool:
        self._count += entry.kind == "chunk" and entry.data["step"] == self._step_id
        if not self.killed_s and self._count == KILLED_AFTER:
            pid = self._cluster.owner_pid(self._execution_id, self._ports)
            if pid is not None:
                kill(pid)
                self.killed_s = time.time()
        return False


async def test_an_executor_that_wakes_up_after_its_lease_is_refused(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    execution_id = await start(http, "saga")
    stopped: list[psutil.Process] = []
    resumed_s = 0.0

    def seen(entry: Entry) -> bool:
        if not stopped and entry.kind == "chunk" and entry.data["step"] == "s1":
            pid = cluster.owner_pid(execution_id)
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            stopped.append(psutil.Process(pid))
        return False

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(follow(http, Reading(execution_id), seen=seen))
        while not stopped:
            await asyncio.sleep(0.01)
        stopped_s = time.monotonic()
        await asyncio.sleep(STOPPED_S)
        os.kill(stopped[0].pid, signal.SIGCONT)
        resumed_s = time.monotonic()
        refusals = await refusals_of(cluster, execution_id)
        refused_s = time.monotonic() - resumed_s
    [record] = await ended(http, [execution_id])
    [journal] = cluster.check(execution_id)
    assert (record["status"], record["attempts"]) == ("completed", 1)
    assert view_problems(reading.result().view, journal) == []
    assert refusals
    [lost] = [entry for entry in journal if entry.kind == "step.resumed"]
    assert stopped[0].pid in cluster.service.replica_pids(EXECUTORS)  # it serves on
    show(
        f"an executor stopped for {resumed_s - stopped_s:.1f} s, its lease is 3 s",
        {
            "terminal events": 1,
            "taken over in step": lost.data["step_id"],
            "stale commits refused": len(refusals),
            "wake-up to refusal": f"{refused_s:.2f} s",
        },
    )


async def refusals_of(cluster: Cluster, execution_id: str) -> list[str]:
    """The executors' own words on commits that the fence refused."""
    async with asyncio.timeout(15):
        while True:
            found = [
                record["message"]
                for record in cluster.log_records("executor")
                if record.get("execution_id") == execution_id
                and "does not own" in record["message"]
            ]
            if found:
                return found
            await asyncio.sleep(0.05)

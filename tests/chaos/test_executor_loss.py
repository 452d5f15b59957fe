"""Executors that are killed, or stopped for longer than their lease, in the middle of a step."""

import asyncio
import os
import signal
import time
from collections import Counter

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
STOPPED_S = 5.0  # the lease is 3 s
pytestmark = pytest.mark.timeout(300)


async def test_kill_of_the_owner_in_the_middle_step(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    take_over_s: list[float] = []
    misses = 0
    completions: Counter[int] = Counter()
    while len(take_over_s) < TRIES:
        await asyncio.to_thread(cluster.service.wait_healthy, 60)
        execution_id = await start(http, "story")
        killed = KillInStepTwo(cluster, execution_id)
        reading = await follow(http, Reading(execution_id), seen=killed.seen)
        [record] = await ended(http, [execution_id])
        assert record["status"] == "completed"
        assert (record["attempts"], [s["attempts"] for s in record["steps"]]) == (1, [1, 1, 1])
        [journal] = cluster.check(execution_id)
        assert view_problems(reading.view, journal) == []
        again = await follow(http, Reading(execution_id))
        assert view_problems(again.view, journal) == []
        done = Counter(e.data["step"] for e in again.view if e.kind == "step.completed")
        assert done == {"one": 1, "two": 1, "three": 1}
        completions.update(done.values())
        if killed.took_s is None:
            misses += 1  # the step had ended before the signal got there
            assert misses < TRIES, "the middle step is never met"
        else:
            take_over_s.append(killed.took_s)
    show(
        "kill -9 of the owning executor in the middle step",
        {
            "kill to next event": spread(take_over_s, "s"),
            "completed": f"{TRIES + misses} of {TRIES + misses}",
            "steps by times completed": dict(completions),
            "killed too late to meet the step": misses,
        },
    )


class KillInStepTwo:
    """Kills the owner at the first chunk of step two, and times the first event of the next."""

    def __init__(self, cluster: Cluster, execution_id: str) -> None:
        self._cluster = cluster
        self._execution_id = execution_id
        self._ports = cluster.executor_ports()
        self._killed_s: float | None = None
        self.took_s: float | None = None

    def seen(self, entry: Entry) -> bool:
        if self._killed_s is None and entry.kind == "chunk" and entry.data["step"] == "two":
            pid = self._cluster.owner_pid(self._execution_id, self._ports)
            if pid is not None:
                self._killed_s = kill(pid)
        elif self._killed_s is not None and entry.kind == "step.retrying" and self.took_s is None:
            self.took_s = time.monotonic() - self._killed_s
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
    [lost] = [entry for entry in journal if entry.kind == "step.retrying"]
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

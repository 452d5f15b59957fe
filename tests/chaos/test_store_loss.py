"""The store killed while executions are being accepted: what was answered with 202 is kept."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import pytest

from tests.chaos.conftest import Cluster, Reading, ended, follow, kill, show, start
from tests.support.checker import loss_and_repetition

CLIENTS = 8
LOAD_S = 7.0
PAUSE_S = 2.0  # before each kill: time to load, and to heal from the one before
KILLS = 2
READERS = 3
IN_THE_MIDDLE_S = 0.2  # of what they read
pytestmark = pytest.mark.timeout(200)


@dataclass
class Load:
    """Clients that start executions, and what they were answered."""

    http: httpx.AsyncClient
    accepted: list[str] = field(default_factory=list)
    refused: Counter[object] = field(default_factory=Counter)
    answers_s: list[float] = field(default_factory=list)

    async def run(self, ends_s: float) -> None:
        while time.monotonic() < ends_s:
            body = {"workflowId": "test-echo", "input": {"n": len(self.accepted)}}
            began_s = time.monotonic()
            try:
                answer = await self.http.post("/v1/execute/async", json=body)
            except httpx.TransportError as error:
                self.refused[type(error).__name__] += 1
                continue
            self.answers_s.append(time.monotonic() - began_s)
            if answer.status_code == 202:
                self.accepted.append(answer.json()["id"])
            else:
                self.refused[answer.status_code] += 1
                await asyncio.sleep(0.05)


async def test_kill_of_the_store_under_load(cluster: Cluster, http: httpx.AsyncClient) -> None:
    load = Load(http)
    readings: list[Reading] = []
    pids = set()
    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(load.run(time.monotonic() + LOAD_S))
        for _ in range(KILLS):
            await asyncio.sleep(PAUSE_S)
            # Short ones: a CPU engine that generates leaves the rest of a small machine little.
            begun = [Reading(await start(http, "story")) for _ in range(READERS)]
            for reading in begun:
                group.create_task(follow(http, reading))
            readings += begun
            await asyncio.sleep(IN_THE_MIDDLE_S)
            pids.add(cluster.endpoint()["pid"])
            kill(cluster.endpoint()["pid"])
    assert len(pids) == KILLS
    assert len(set(load.accepted)) == len(load.accepted)
    statuses = Counter(record["status"] for record in await ended(http, load.accepted))
    journals = cluster.check(*(reading.execution_id for reading in readings))
    counts = [loss_and_repetition(r.view, j) for r, j in zip(readings, journals, strict=True)]
    show(
        f"kill -9 of the store, {KILLS} times in {LOAD_S:.0f} s, {CLIENTS} clients",
        {
            "accepted": len(load.accepted),
            "refused": dict(load.refused) or 0,
            "ended as": dict(statuses),
            "lost": len(load.accepted) - statuses.total(),
            "longest answer": f"{max(load.answers_s):.2f} s",
            f"events of {len(readings)} generating ones": sum(count.expected for count in counts),
            "of these lost": sum(count.lost for count in counts),
            "of these repeated": sum(count.repeated for count in counts),
        },
    )
    assert statuses == {"completed": len(load.accepted)}
    cluster.check(*load.accepted)
    assert not any(count.lost or count.repeated for count in counts)
    assert {reading.view[-1].kind for reading in readings} == {"execution.completed"}

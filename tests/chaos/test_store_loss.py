"""The store killed while executions are being accepted: what was answered with 202 is kept."""

import asyncio
import time
from collections import Counter

import httpx
import pytest

from tests.chaos.conftest import Cluster, Reading, ended, follow, kill, show, start
from tests.support.checker import loss_and_repetition

CLIENTS = 8
READERS = 3
LOAD_S = 6.0
KILL_AFTER_S = (1.5, 3.5)
pytestmark = pytest.mark.timeout(200)


async def test_kill_of_the_store_under_load(cluster: Cluster, http: httpx.AsyncClient) -> None:
    accepted: list[str] = []
    refused: Counter[object] = Counter()
    answers_s: list[float] = []
    readings = [Reading(await start(http, "saga")) for _ in range(READERS)]
    ends_s = time.monotonic() + LOAD_S

    async def client(number: int) -> None:
        while time.monotonic() < ends_s:
            body = {"workflowId": "test-echo", "input": {"client": number, "n": len(accepted)}}
            began_s = time.monotonic()
            try:
                answer = await http.post("/v1/execute/async", json=body)
            except httpx.TransportError as error:
                refused[type(error).__name__] += 1
                continue
            answers_s.append(time.monotonic() - began_s)
            if answer.status_code == 202:
                accepted.append(answer.json()["id"])
            else:
                refused[answer.status_code] += 1
                await asyncio.sleep(0.05)

    async def killer() -> list[int]:
        began_s, pids = time.monotonic(), []
        for after_s in KILL_AFTER_S:
            await asyncio.sleep(began_s + after_s - time.monotonic())
            pids.append(cluster.endpoint()["pid"])
            kill(pids[-1])
        return pids

    async with asyncio.TaskGroup() as group:
        killing = group.create_task(killer())
        for reading in readings:
            group.create_task(follow(http, reading))
        for number in range(CLIENTS):
            group.create_task(client(number))
    assert len(set(killing.result())) == len(KILL_AFTER_S)
    assert len(set(accepted)) == len(accepted)
    records = await ended(http, accepted)
    statuses = Counter(record["status"] for record in records)
    journals = cluster.check(*(reading.execution_id for reading in readings))
    counts = [loss_and_repetition(r.view, j) for r, j in zip(readings, journals, strict=True)]
    show(
        f"kill -9 of the store, {len(KILL_AFTER_S)} times in {LOAD_S:.0f} s, {CLIENTS} clients",
        {
            "accepted": len(accepted),
            "refused": dict(refused) or 0,
            "ended as": dict(statuses),
            "lost": len(accepted) - statuses.total(),
            "longest answer": f"{max(answers_s):.2f} s",
            f"events of {READERS} generating ones": sum(count.expected for count in counts),
            "of these lost": sum(count.lost for count in counts),
            "of these repeated": sum(count.repeated for count in counts),
        },
    )
    assert statuses == {"completed": len(accepted)}
    cluster.check(*accepted)
    assert not any(count.lost or count.repeated for count in counts)
    assert {reading.view[-1].kind for reading in readings} == {"execution.completed"}

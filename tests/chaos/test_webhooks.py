"""Webhooks while their dispatcher is killed: every end is told, with the same id each time.

`INFERPIPE_CHAOS_WEBHOOKS` sets the number of executions; 10000 takes some minutes.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import pytest

from tests.chaos.conftest import Cluster, kill, show, spread
from tests.support.receiver import Got, receiver, status

COUNT = int(os.environ.get("INFERPIPE_CHAOS_WEBHOOKS", "600"))
CALM = 100  # executions told before anything is killed
KILLS = 5
CALLERS = 16
FAILS = 0.2
WITHIN_S = 60 + COUNT / 20
DISPATCHER = "webhook_dispatcher"
pytestmark = pytest.mark.timeout(120 + 3 * WITHIN_S)


@dataclass
class Heard:
    """What the receiver has seen: first tries, all tries, and what it said yes to."""

    chance: random.Random
    fails: float = FAILS
    first_ms: dict[str, float] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    event_ids: dict[str, set[str]] = field(default_factory=dict)
    has_changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, got: Got, writer: asyncio.StreamWriter) -> None:
        event = json.loads(got.body)
        execution_id = event["data"]["executionId"]
        ended_ms = time.mktime(time.strptime(event["createdAt"][:19], "%Y-%m-%dT%H:%M:%S"))
        ended_ms = (ended_ms - time.timezone) * 1000 + int(event["createdAt"][20:23])
        self.first_ms.setdefault(execution_id, time.time() * 1000 - ended_ms)
        self.tries[execution_id] += 1
        assert event["id"] == got.headers["webhook-id"]
        self.event_ids.setdefault(execution_id, set()).add(event["id"])
        is_failure = self.chance.random() < self.fails
        if not is_failure:
            self.accepted[execution_id] += 1
            self.has_changed.set()
        await status(503 if is_failure else 200)(got, writer)

    async def all_of(self, execution_ids: set[str]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while execution_ids - self.accepted.keys():
                self.has_changed.clear()
                await self.has_changed.wait()


async def execute_all(http: httpx.AsyncClient, count: int) -> set[str]:
    """Ids of so many executions, accepted over HTTP."""
    left, ids = iter(range(count)), set[str]()

    async def caller() -> None:
        for number in left:
            body = {"workflowId": "test-echo", "input": {"n": number}}
            answer = await http.post("/v1/execute/async", json=body)
            assert answer.status_code == 202, answer.text
            ids.add(answer.json()["id"])

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return ids


async def kill_once_it_sends(cluster: Cluster, heard: Heard) -> int:
    """Kill the dispatcher while it is sending; how many processes."""
    before = sum(heard.tries.values())
    async with asyncio.timeout(WITHIN_S):
        while sum(heard.tries.values()) < before + 5:
            await asyncio.sleep(0.01)
    pids = await asyncio.to_thread(cluster.service.replica_pids, DISPATCHER)
    for pid in pids:
        kill(pid)
    return len(pids)


async def test_every_end_is_told_although_the_dispatcher_dies(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    heard = Heard(random.Random(1), fails=0.0)
    async with receiver(heard.answer) as there:
        made = await http.post("/v1/webhooks", json={"url": there.url, "events": ["*"]})
        assert made.status_code == 201, made.text
        path = f"/v1/webhooks/{made.json()['id']}"
        calm = await execute_all(http, CALM)
        await heard.all_of(calm)
        calm_ms = [heard.first_ms[execution_id] for execution_id in calm]
        heard.fails = FAILS
        ids, killed = set[str](), 0
        for _ in range(KILLS):
            killing = asyncio.ensure_future(kill_once_it_sends(cluster, heard))
            ids |= await execute_all(http, COUNT // KILLS)
            killed += await killing
        await heard.all_of(ids)
        assert killed >= KILLS
        assert (await http.delete(path)).status_code == 204
    repeated = {eid: count for eid, count in heard.accepted.items() if count > 1}
    assert {eid for eid, events in heard.event_ids.items() if len(events) != 1} == set()
    assert calm | ids == heard.accepted.keys()
    show(
        f"webhooks: {KILLS} kill -9 of the dispatcher, a receiver that fails {FAILS:.0%}",
        {
            "executions": len(ids),
            "ends told": f"{len(ids & heard.accepted.keys())} of {len(ids)}",
            "told more than once": len(repeated),
            "tries": sum(heard.tries.values()),
            "end to first try, calm": spread([ms / 1000 for ms in calm_ms], "s"),
            "end to first try, with the kills": spread(
                [heard.first_ms[eid] / 1000 for eid in ids], "s"
            ),
        },
    )

"""Readers whose connections break: by themselves, or with the ingress under them."""

import asyncio
import random
import time

import httpx
import pytest

from tests.chaos.conftest import Cluster, Reading, follow, kill, show, spread, start
from tests.support.checker import Entry, loss_and_repetition, view_problems

READERS_KILLED = 20
READERS_CUT = 50
EXECUTIONS_CUT = 5
pytestmark = pytest.mark.timeout(200)


async def test_kill_of_the_ingress_under_its_readers(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    ids = [await start(http, "saga") for _ in range(READERS_KILLED)]
    readings = [Reading(execution_id) for execution_id in ids]
    killed_s = 0.0
    silent: dict[str, float] = {}

    def noting(reading: Reading) -> "asyncio.Task[Reading]":
        def seen(_: Entry) -> bool:
            if reading.broken_count and reading.execution_id not in silent:
                silent[reading.execution_id] = time.monotonic() - killed_s
            return False

        return group.create_task(follow(http, reading, seen=seen))

    async with asyncio.TaskGroup() as group:
        for reading in readings:
            noting(reading)
        while not all(len(reading.view) > 5 for reading in readings):
            await asyncio.sleep(0.02)
        [pid] = cluster.service.replica_pids("ingress")
        killed_s = kill(pid)
    journals = cluster.check(*ids)
    pairs = list(zip(readings, journals, strict=True))
    counts = [loss_and_repetition(reading.view, journal) for reading, journal in pairs]
    show(
        f"kill -9 of the ingress under {READERS_KILLED} readers",
        {
            "readers broken off": sum(reading.broken_count > 0 for reading in readings),
            "refused while it was away": sum(reading.refused_count for reading in readings),
            "events expected": sum(count.expected for count in counts),
            "events lost": sum(count.lost for count in counts),
            "events repeated": sum(count.repeated for count in counts),
            "gap events": sum(reading.gap_count for reading in readings),
            "kill to next event": spread(list(silent.values()), "s"),
        },
    )
    assert all(reading.broken_count > 0 for reading in readings)
    assert all(view_problems(reading.view, journal) == [] for reading, journal in pairs)
    assert not any(reading.gap_count for reading in readings)


async def test_readers_cut_at_random(cluster: Cluster, http: httpx.AsyncClient) -> None:
    ids = [await start(http, "saga") for _ in range(EXECUTIONS_CUT)]
    readings = [Reading(ids[number % len(ids)]) for number in range(READERS_CUT)]
    await asyncio.gather(
        *(follow(http, reading, seen=lambda _: random.random() < 0.01) for reading in readings)
    )
    journals = dict(zip(ids, cluster.check(*ids), strict=True))
    pairs = [(reading, journals[reading.execution_id]) for reading in readings]
    counts = [loss_and_repetition(reading.view, journal) for reading, journal in pairs]
    cuts = sum(reading.cut_count for reading in readings)
    show(
        f"{READERS_CUT} readers cut at random and resumed by Last-Event-ID",
        {
            "cuts": cuts,
            "events expected": sum(count.expected for count in counts),
            "events lost": sum(count.lost for count in counts),
            "events repeated": sum(count.repeated for count in counts),
        },
    )
    assert cuts > READERS_CUT
    assert all(view_problems(reading.view, journal) == [] for reading, journal in pairs)

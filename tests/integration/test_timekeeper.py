"""Clocks on every kind of store: each due time once, whoever keeps time and whatever dies."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.events import timekeeper_of
from serve_app.adapters.redis_connect import RedisConnections
from serve_app.core.errors import StoreUnavailableError
from serve_app.core.triggers import started_by_clock
from serve_app.services.timekeeper import Timekeeper
from serve_app.services.triggered_starts import TriggeredStarts
from tests.integration.test_events import PARTITIONS, define, started
from tests.support.api import Api, running_api

CONFIG, MINUTE_MS = "ip:{config}", 60_000
EVERY = "triggers: [{cron: '* * * * *', catchUp: %s}]\nsteps: [{id: a, transform: '{{ event }}'}]"


@pytest.fixture
async def api(store_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(store_url, tmp_path) as running:
        await calls(running)("SET", f"{CONFIG}:cron:owner", "k1", "PX", 600_000)
        yield running


def calls(api: Api) -> Any:
    return api.services.executions._store._calls.call


def keeper(api: Api, name: str) -> Timekeeper:
    store, services = api.services.executions._store, api.services
    stores = RedisConnections(store._calls._nodes, store._calls, store)
    return timekeeper_of(services.settings, stores, services.catalog, services.clock, name)


async def set_clock(api: Api, name: str, late_ms: int, workspace: str = "default") -> int:
    """Say that nothing was dealt with for so long; the moment that then counts as dealt with."""
    call, clock = calls(api), f"{workspace} {name}"
    before = await dealt_with(api, name, workspace)
    after_ms = before - late_ms
    version = (await call("HGET", f"{CONFIG}:cron:from", clock)).split()[1].decode()
    await call("HSET", f"{CONFIG}:cron:from", clock, f"{after_ms} {version}")
    await call("ZADD", f"{CONFIG}:cron", 0, clock)
    return after_ms


async def dealt_with(api: Api, name: str, workspace: str = "default") -> int:
    """Up to when."""
    return int((await calls(api)("HGET", f"{CONFIG}:cron:from", f"{workspace} {name}")).split()[0])


async def due_of(api: Api, name: str, **headers: str) -> list[int]:
    return sorted(one["data"]["ts"] for one in await started(api, name, **headers))


def minutes(after_ms: int, until_ms: int) -> list[int]:
    first = after_ms // MINUTE_MS + 1
    return [MINUTE_MS * n for n in range(first, until_ms // MINUTE_MS + 1)]


@pytest.mark.parametrize("policy", ["skip", "latest", "all"])
async def test_what_was_missed_is_caught_up_on_as_the_policy_says(api: Api, policy: str) -> None:
    await define(api, "tick", EVERY % policy)
    after_ms = await set_clock(api, "tick", 10 * MINUTE_MS)
    await keeper(api, "k1").beat()
    until_ms = await dealt_with(api, "tick")
    missed = minutes(after_ms, until_ms)
    assert len(missed) >= 10
    expected = {
        "all": missed,
        "latest": missed[-1:],
        "skip": [at for at in missed if at > until_ms - MINUTE_MS],
    }
    assert await due_of(api, "tick") == expected[policy]
    score = int(float(await calls(api)("ZSCORE", f"{CONFIG}:cron", "default tick")))
    assert score == (until_ms // MINUTE_MS + 1) * MINUTE_MS


async def test_what_a_clock_starts_says_so(api: Api) -> None:
    text = "triggers: [{cron: '* * * * *'}]\nsteps: [{id: a, transform: '{{ [input, event] }}'}]"
    await define(api, "tick", text)
    await set_clock(api, "tick", 5 * MINUTE_MS)
    await keeper(api, "k1").beat()
    (record,) = await started(api, "tick")
    given, event = record["data"]
    assert given == {}
    assert (event["name"], event["data"]) == ("* * * * *", {})
    assert record["id"] == started_by_clock(PARTITIONS, "default", "tick", event["ts"])
    assert record["trigger"]["type"] == "cron"


async def test_one_of_two_keeps_time_and_the_other_takes_over(api: Api) -> None:
    await define(api, "tick", EVERY % "all")
    one, two = keeper(api, "k1"), keeper(api, "k2")
    after_ms = await set_clock(api, "tick", 5 * MINUTE_MS)
    await two.beat()  # the lease is the other's
    assert await dealt_with(api, "tick") == after_ms
    await asyncio.gather(*(k.beat() for k in (one, two, one, two)))
    until_ms = await dealt_with(api, "tick")
    assert await due_of(api, "tick") == minutes(after_ms, until_ms)
    await one._release()
    later_ms = await set_clock(api, "tick", 0)
    await calls(api)("SET", f"{CONFIG}:cron:owner", "k2", "PX", 600_000)  # not the api's own
    await two.beat()
    assert await dealt_with(api, "tick") > later_ms


async def test_a_keeper_that_lost_its_lease_unaware_starts_nothing_twice(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs between its look and its starts, until another has done the same work."""
    await define(api, "tick", EVERY % "all")
    after_ms = await set_clock(api, "tick", 5 * MINUTE_MS)
    start, may_go, is_hanging = TriggeredStarts.start, asyncio.Event(), asyncio.Event()
    hung: set[str] = set()

    async def hanging(self: TriggeredStarts, wish: Any) -> bool:
        if not may_go.is_set() and wish.execution_id not in hung:
            hung.add(wish.execution_id)
            is_hanging.set()
            await may_go.wait()
        return await start(self, wish)

    monkeypatch.setattr(TriggeredStarts, "start", hanging)
    first = asyncio.ensure_future(keeper(api, "k1").beat())
    await is_hanging.wait()
    while len(hung) < 5:
        await asyncio.sleep(0)
    await calls(api)("SET", f"{CONFIG}:cron:owner", "k2", "PX", 600_000)
    await keeper(api, "k2").beat()
    until_ms = await dealt_with(api, "tick")
    may_go.set()
    await first
    assert await dealt_with(api, "tick") == until_ms
    assert await due_of(api, "tick") == minutes(after_ms, until_ms)


async def test_a_crash_between_the_start_and_its_note_starts_nothing_twice(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sound", "tick"):
        await define(api, name, EVERY % "latest")
        await set_clock(api, name, 5 * MINUTE_MS)
    start, deaths = TriggeredStarts.start, [0]

    async def dying(self: TriggeredStarts, wish: Any) -> bool:
        made = await start(self, wish)
        deaths[0] += 1
        if wish.workflow.id == "tick" and deaths[0] <= 4:
            raise StoreUnavailableError("killed after the start")
        return made

    monkeypatch.setattr(TriggeredStarts, "start", dying)
    after_ms = await dealt_with(api, "tick")
    one = keeper(api, "k1")
    assert await one.beat() == 1000  # it asks again with its next beat
    assert await dealt_with(api, "tick") == after_ms
    assert await dealt_with(api, "sound") > after_ms
    while await dealt_with(api, "tick") == after_ms:
        await one.beat()
    assert deaths[0] > 2
    due = await due_of(api, "tick")
    assert len(due) == len(set(due))
    assert await calls(api)("ZCARD", f"{CONFIG}:cron") == 2


async def test_definitions_set_and_take_clocks_away(api: Api) -> None:
    await define(api, "tick", EVERY % "latest")
    first_ms = await dealt_with(api, "tick")
    await define(api, "tick", EVERY % "latest")  # the same: it keeps its time
    assert await dealt_with(api, "tick") == first_ms
    await set_clock(api, "tick", 60 * MINUTE_MS)
    await define(api, "tick", EVERY % "all")  # a new version begins now
    await keeper(api, "k1").beat()
    assert len(await started(api, "tick")) <= 1
    await define(api, "tick", "steps: [{id: a, echo: {}}]")
    assert await calls(api)("ZCARD", f"{CONFIG}:cron") == 0
    await define(api, "tick", EVERY % "all")
    assert (await api.http.delete("/v1/workflows/tick")).status_code == 204
    assert await calls(api)("HLEN", f"{CONFIG}:cron:from") == 0
    assert await keeper(api, "k1").beat() == 1000


async def test_each_workspace_has_its_own_clock(api: Api) -> None:
    other = await api.new_workspace("second")
    await define(api, "tick", EVERY % "latest")
    await define(api, "tick", EVERY % "latest", **other)
    await set_clock(api, "tick", 2 * MINUTE_MS, "second")
    await keeper(api, "k1").beat()
    assert len(await started(api, "tick", **other)) == 1
    assert await started(api, "tick") == []


async def test_a_clock_that_went_back_starts_nothing_again_and_does_not_stand_still(
    api: Api,
) -> None:
    await define(api, "tick", EVERY % "all")
    ahead_ms = await set_clock(api, "tick", -10 * MINUTE_MS)  # dealt with until in ten minutes
    await keeper(api, "k1").beat()
    assert await dealt_with(api, "tick") == ahead_ms
    far_ms = await set_clock(api, "tick", -400 * 24 * 60 * MINUTE_MS)
    await keeper(api, "k1").beat()
    assert await dealt_with(api, "tick") < far_ms - 300 * 24 * 60 * MINUTE_MS
    assert await started(api, "tick") == []


async def test_a_keeper_runs_by_itself(store_url: str, tmp_path: Path) -> None:
    async with running_api(store_url, tmp_path) as api:
        await define(api, "tick", EVERY % "latest")
        await set_clock(api, "tick", 2 * MINUTE_MS)
        async with asyncio.timeout(20):
            while not await started(api, "tick"):
                await asyncio.sleep(0.02)

"""Events that answer waiting steps and cancel executions, on every kind of store."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.adapters.redis_events import RedisEvents
from serve_app.core.errors import StoreUnavailableError
from serve_app.core.journal import Outgoing
from serve_app.core.subscriptions import SUBSCRIBE_LOG
from serve_app.services import fan_out
from tests.integration.test_events import PARTITIONS, carried_out, define, send, sent
from tests.support.api import Api, running_api
from tests.support.checker import entries_of_stored, journal_problems

ENDED = ("completed", "failed", "cancelled")
WAIT = """
steps:
  - id: paid
    wait_for_event: {event: shop/paid, if: "event.data.order == input.order", timeout: 1h}
"""
BOTH = """
steps:
  - id: both
    parallel:
      branches:
        left: [{id: one, wait_for_event: {event: n, timeout: 1h}}]
        right: [{id: two, wait_for_event: {event: n, if: "event.data > 1", timeout: 1h}}]
"""
ROUNDS = """
steps:
  - id: rounds
    loop:
      while: "true"
      maxRounds: 2
      steps: [{id: next, wait_for_event: {event: n, timeout: 1h}}]
"""
NAP = """
cancelOn: [{event: shop/closed, if: "event.data.order == input.order"}]
steps: [{id: nap, sleep: 1h}]
"""


@pytest.fixture
async def api(store_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(store_url, tmp_path) as running:
        yield running


async def start(api: Api, text: str, **value: object) -> str:
    await define(api, "w", text)
    body = {"workflowId": "w", "input": value}
    return str((await api.http.post("/v1/execute/async", json=body)).json()["id"])


async def until(api: Api, execution_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            record = (await api.http.get(f"/v1/executions/{execution_id}")).json()
            if record["status"] in statuses:
                return dict(record)
            await asyncio.sleep(0.01)


async def waiting(api: Api, text: str, **value: object) -> str:
    """Start and wait until it is parked and its topics know of it."""
    execution_id = await start(api, text, **value)
    await until(api, execution_id, "waiting")
    await carried_out(api)
    return execution_id


async def subscriber_count(api: Api) -> int:
    """All there are, in any topic."""
    await carried_out(api)
    calls, total = api.services.executions._store._calls, 0
    for name in ("shop/paid", "shop/closed", "n"):
        for partition in range(PARTITIONS):
            total += await calls.call("HLEN", f"ip:{{{partition}}}:sub:default:{name}")
    return total


async def second_round(api: Api, execution_id: str) -> list[str]:
    """How the rounds' steps stand once the second has begun and nothing is under way."""
    async with asyncio.timeout(20):
        while True:
            record = await until(api, execution_id, "waiting", *ENDED)
            statuses = [one["status"] for one in record["steps"] if one["id"] != "rounds"]
            if len(statuses) > 1:
                await carried_out(api)
                return statuses
            await asyncio.sleep(0.01)


async def check(api: Api, execution_id: str) -> None:
    journal = await api.services.executions._store.read(execution_id, 0, 10_000)
    assert journal_problems(entries_of_stored(journal)) == []


async def test_an_event_answers_the_step_it_fits_and_no_other(api: Api) -> None:
    mine, other = await waiting(api, WAIT, order=7), await waiting(api, WAIT, order=8)
    for data in ({"order": 6}, {}, {"order": "7"}, 7):
        await sent(api, {"name": "shop/paid", "data": data})
    await sent(api, {"name": "shop/paid2", "data": {"order": 7}})
    await carried_out(api)
    for one in (mine, other):  # what does not fit leaves nothing behind
        execution = await api.services.executions.load("default", one)
        assert (execution.status, execution.signals) == ("waiting", ())
    await sent(api, {"name": "shop/paid", "data": {"order": 7}})
    record = await until(api, mine, *ENDED)
    assert record["data"] == {"name": "shop/paid", "data": {"order": 7}}
    assert (await until(api, other, "waiting"))["steps"][0]["status"] == "waiting"
    assert await subscriber_count(api) == 1
    await check(api, mine)


async def test_an_emitted_event_answers_too(api: Api) -> None:
    mine = await waiting(api, WAIT, order=7)
    await define(api, "payer", "steps: [{id: e, emit: {name: shop/paid, data: {order: 7}}}]")
    await api.http.post("/v1/execute", json={"workflowId": "payer", "input": {}})
    assert (await until(api, mine, *ENDED))["data"]["data"] == {"order": 7}


async def test_each_step_that_waits_hears_an_event(api: Api) -> None:
    mine = await waiting(api, BOTH)
    await sent(api, {"name": "n", "data": 1})
    await carried_out(api)
    assert await subscriber_count(api) == 1
    await sent(api, {"name": "n", "data": 2})
    record = await until(api, mine, *ENDED)
    assert record["data"] == {"left": {"name": "n", "data": 1}, "right": {"name": "n", "data": 2}}
    again = await waiting(api, BOTH)
    await sent(api, {"name": "n", "data": 3})
    answers = (await until(api, again, *ENDED))["data"]
    assert answers == {side: {"name": "n", "data": 3} for side in ("left", "right")}
    assert await subscriber_count(api) == 0


async def test_an_event_answers_one_round_and_none_that_came_before(api: Api) -> None:
    await sent(api, {"name": "n", "data": 0})
    await carried_out(api)
    mine = await waiting(api, ROUNDS)
    await sent(api, {"name": "n", "data": 1})
    assert await second_round(api, mine) == ["completed", "waiting"]
    await sent(api, {"name": "n", "data": 2})
    assert (await until(api, mine, *ENDED))["data"] == {"name": "n", "data": 2}


async def test_an_event_between_the_wait_and_its_subscription_is_heard(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subscription is held up until the event has been carried out to all who were there."""
    take, may_pass, held = RedisEvents.take, asyncio.Event(), asyncio.Event()

    async def late(self: RedisEvents, outgoing: Outgoing) -> bool:
        if outgoing.log.startswith(SUBSCRIBE_LOG) and not may_pass.is_set():
            held.set()
            raise StoreUnavailableError("held up")
        return await take(self, outgoing)

    monkeypatch.setattr(RedisEvents, "take", late)
    mine = await start(api, WAIT, order=7)
    await until(api, mine, "waiting")
    await held.wait()
    ids = await sent(api, {"name": "shop/paid", "data": {"order": 7}})
    calls, topic = api.services.executions._store._calls, ids[0]
    async with asyncio.timeout(20):
        while await messages_of(calls, f"/{topic}/out"):
            await asyncio.sleep(0.01)
    assert (await until(api, mine, "waiting"))["status"] == "waiting"
    may_pass.set()
    assert (await until(api, mine, *ENDED))["data"]["data"] == {"order": 7}
    assert await subscriber_count(api) == 0


async def messages_of(calls: Any, ending: str) -> int:
    """How many messages whose id ends so are in any outbox."""
    count = 0
    for partition in range(PARTITIONS):
        rows = await calls.call("XRANGE", f"ip:{{{partition}}}:outbox", "-", "+")
        count += sum(members[b"m"].decode().endswith(ending) for _, members in rows)
    return count


async def test_a_crash_around_the_append_answers_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, deaths = fan_out.append, [0, 0]

    async def dying(*args: Any) -> bool:
        deaths[0] += 1
        if deaths[0] <= 2:
            raise StoreUnavailableError("killed before")
        done = await append(*args)
        deaths[1] += 1
        if deaths[1] <= 2:
            raise StoreUnavailableError("killed after")
        return done

    monkeypatch.setattr(fan_out, "append", dying)
    mine = await waiting(api, ROUNDS)
    await sent(api, {"name": "n", "data": 1})
    assert await second_round(api, mine) == ["completed", "waiting"]
    assert deaths[0] > 2
    await sent(api, {"name": "n", "data": 2})
    assert (await until(api, mine, *ENDED))["data"] == {"name": "n", "data": 2}
    await check(api, mine)


async def test_an_event_cancels_what_it_is_meant_for(api: Api) -> None:
    mine, other = await waiting(api, NAP, order=7), await waiting(api, NAP, order=8)
    done = await start(api, NAP.replace("sleep: 1h", "sleep: 1ms"), order=7)
    await until(api, done, "completed")
    assert await subscriber_count(api) == 2
    await sent(api, {"name": "shop/closed", "data": {}})
    await sent(api, {"name": "shop/closed", "id": "c7", "data": {"order": 7}})
    record = await until(api, mine, *ENDED)
    assert (record["status"], record["errorCode"]) == ("cancelled", "CANCELLED")
    assert "shop/closed (c7)" in record["error"]
    await carried_out(api)
    assert (await until(api, other, "waiting"))["status"] == "waiting"
    assert await subscriber_count(api) == 1
    await check(api, mine)


async def test_one_that_has_not_started_is_cancelled_too(api: Api) -> None:
    limited = "concurrency: {limit: 1}\n" + NAP
    first = await waiting(api, limited, order=1)
    second = await start(api, limited, order=2)
    await until(api, second, "pending")
    await sent(api, {"name": "shop/closed", "data": {"order": 2}})
    record = await until(api, second, *ENDED)
    assert (record["status"], record["steps"]) == ("cancelled", [])
    assert (await until(api, first, "waiting"))["status"] == "waiting"


async def test_a_child_hears_what_cancels_it(api: Api) -> None:
    await define(api, "child", NAP)
    await waiting(api, "steps: [{id: c, workflow: {id: child, input: {order: 7}}}]")
    async with asyncio.timeout(20):
        while not await subscriber_count(api):
            await asyncio.sleep(0.01)
    await sent(api, {"name": "shop/closed", "data": {"order": 7}})
    listed = (await api.http.get("/v1/executions?workflowId=child")).json()["items"]
    assert (await until(api, listed[0]["id"], *ENDED))["status"] == "cancelled"


async def test_another_workspace_neither_answers_nor_cancels(api: Api) -> None:
    other = await api.new_workspace("second")
    key = other["Authorization"].removeprefix("Bearer ")
    step, nap = await waiting(api, WAIT, order=7), await waiting(api, NAP, order=7)
    for name in ("shop/paid", "shop/closed"):
        answer = await send(api, {"name": name, "data": {"order": 7}}, key)
        assert answer.status_code == 200
    await carried_out(api)
    for one in (step, nap):
        assert (await until(api, one, "waiting", *ENDED))["status"] == "waiting"


async def test_a_wait_that_ended_otherwise_leaves_no_subscription(api: Api) -> None:
    signalled = await waiting(api, WAIT, order=7)
    body = {"name": "paid", "data": 1}
    await api.http.post(f"/v1/executions/{signalled}/signal", json=body)
    await until(api, signalled, *ENDED)
    cancelled = await waiting(api, WAIT, order=7)
    await api.http.post(f"/v1/executions/{cancelled}/cancel")
    await until(api, cancelled, *ENDED)
    timed_out = await start(api, WAIT.replace("1h", "1ms"), order=7)
    assert (await until(api, timed_out, *ENDED))["data"] is None
    assert await subscriber_count(api) == 0


async def test_a_hundred_that_wait_for_one_event_all_hear_it(api: Api) -> None:
    await define(api, "w", "steps: [{id: a, wait_for_event: {event: n, timeout: 1h}}]")
    body = {"workflowId": "w", "input": {}}
    ids = [(await api.http.post("/v1/execute/async", json=body)).json()["id"] for _ in range(100)]
    for one in ids:
        await until(api, one, "waiting")
    assert await subscriber_count(api) == 100
    await sent(api, {"name": "n", "data": 5})
    ended = [await until(api, one, *ENDED) for one in ids]
    assert {one["data"]["data"] for one in ended} == {5}
    assert await subscriber_count(api) == 0

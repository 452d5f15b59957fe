"""Events over HTTP and every kind of store: what they start, and what they start only once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.core.app_events import FAN_OUT_LOG, AppEvent, event_message
from serve_app.core.auth import Scope
from serve_app.core.errors import StoreUnavailableError
from serve_app.core.journal import Outgoing
from serve_app.core.triggers import started_by_event
from serve_app.services.triggered_starts import TriggeredStarts
from tests.support.api import ADMIN_KEY, Api, running_api

PARTITIONS = 4  # of `running_api`
ECHO = "steps: [{id: got, transform: {data: '{{ input }}', event: '{{ event }}'}}]"
TICKETS = "triggers: [{event: app/ticket.created, if: 'event.data.priority > 2'}]\n" + ECHO


@pytest.fixture
async def api(store_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(store_url, tmp_path) as running:
        yield running


async def define(api: Api, name: str, text: str, **headers: str) -> None:
    path = f"/v1/workflows/{name}"
    put = await api.http.put(path, json=yaml.safe_load(text), headers=headers)
    assert put.status_code in (200, 201), put.text


async def send(api: Api, body: object, key: str = ADMIN_KEY, **headers: str) -> httpx.Response:
    request = api.http.build_request("POST", f"/e/{key}", json=body, headers=headers)
    del request.headers["Authorization"]  # the key in the path is all that an SDK sends
    return await api.http.send(request)


async def sent(api: Api, body: object, **headers: str) -> list[str]:
    answer = await send(api, body, **headers)
    assert (answer.status_code, answer.json()["status"]) == (200, 200), answer.text
    return list(answer.json()["ids"])


async def carried_out(api: Api) -> None:
    """Wait until no topic has anything left to do."""
    store = api.services.executions._store
    async with asyncio.timeout(20):
        for partition in range(PARTITIONS):
            while await store._calls.call("XLEN", f"ip:{{{partition}}}:outbox"):
                await asyncio.sleep(0.01)


async def started(api: Api, workflow_id: str, **headers: str) -> list[dict[str, Any]]:
    """The executions there are once every event has been carried out, oldest first, ended."""
    await carried_out(api)
    query = f"/v1/executions?workflowId={workflow_id}&limit=200"
    items = (await api.http.get(query, headers=headers)).json()["items"]
    records = []
    async with asyncio.timeout(20):
        for item in reversed(items):
            while True:
                path = f"/v1/executions/{item['id']}"
                record = (await api.http.get(path, headers=headers)).json()
                if record["completedAt"]:
                    break
                await asyncio.sleep(0.01)
            records.append(record)
    return records


async def test_an_event_starts_what_takes_it_and_is_seen_by_its_steps(api: Api) -> None:
    await define(api, "tickets", TICKETS)
    await define(api, "all", "triggers: [{event: 'app/*'}, {event: app/ticket.created}]\n" + ECHO)
    await define(api, "other", "triggers: [{event: shop/*}]\n" + ECHO)
    high = {"name": "app/ticket.created", "data": {"priority": 3}, "id": "t1", "ts": 17, "v": "x"}
    low = {"name": "app/ticket.created", "data": {"priority": 1}, "user": {"id": "u"}}
    ids = await sent(api, [high, low])
    assert ids[0] == "t1"
    assert ids[1].startswith("evt_")
    (ticket,) = await started(api, "tickets")
    event = {"id": "t1", "name": "app/ticket.created", "ts": 17, "data": {"priority": 3}}
    assert ticket["data"] == {"data": {"priority": 3}, "event": event}
    assert ticket["trigger"] == {
        "type": "event",
        "id": "t1",
        "name": "app/ticket.created",
        "at": "1970-01-01T00:00:00.017Z",
    }
    assert ticket["id"] == started_by_event(PARTITIONS, "default", "t1", "tickets")
    both = await started(api, "all")
    assert {one["data"]["event"]["id"] for one in both} == set(ids)
    users = [one["data"]["event"].get("user") for one in both]
    assert sorted(map(str, users)) == ["None", "{'id': 'u'}"]
    assert await started(api, "other") == []


async def test_the_same_id_starts_nothing_twice(api: Api) -> None:
    await define(api, "tickets", "triggers: [{event: n}]\n" + ECHO)
    event = {"name": "n", "id": "e1", "data": {"a": 1}}
    answers = await asyncio.gather(*(send(api, [event, {**event, "data": {}}]) for _ in range(5)))
    assert all(answer.json() == {"ids": ["e1", "e1"], "status": 200} for answer in answers)
    assert [one["data"]["data"] for one in await started(api, "tickets")] == [{"a": 1}]


async def test_a_send_that_is_repeated_under_its_seed_or_key_sends_nothing_twice(api: Api) -> None:
    await define(api, "tickets", "triggers: [{event: n}]\n" + ECHO)
    body, seed = [{"name": "n"}, {"name": "n"}], {"x-inngest-event-id-seed": "17,AAAA"}
    first, again = await sent(api, body, **seed), await sent(api, body, **seed)
    assert first == again
    assert len(set(first)) == 2
    other = await sent(api, body, **{"x-inngest-event-id-seed": "18,AAAA"})
    assert not set(first) & set(other)
    keyed = [await send(api, body, **{"Idempotency-Key": "k"}) for _ in range(2)]
    assert keyed[0].json() == keyed[1].json()
    conflict = await send(api, body[:1], **{"Idempotency-Key": "k"})
    assert (conflict.status_code, conflict.json()["code"]) == (409, "IDEMPOTENCY_CONFLICT")
    assert isinstance(conflict.json()["error"], str)
    assert len(await started(api, "tickets")) == 6


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "name"),
        ([{"name": "a"}, {"name": ""}], 422, "body.1.name"),
        ([{"name": "a"}, "b"], 422, "body.1"),
        ("a", 422, "body"),
        ({"name": "inngest/function.failed"}, 422, "reserved"),
        ({"name": "a b"}, 422, "spaces"),
        ({"name": "a", "id": "x" * 257}, 422, "id"),
        ({"name": "a", "ts": -1}, 422, "ts"),
        ({"name": "a", "ts": "now"}, 422, "ts"),
        ({"name": "a", "ts": 253_402_300_800_000}, 422, "ts"),
        ({"name": "a", "user": "u"}, 422, "user"),
        ([{"name": "a"}] * 501, 422, "at most 500"),
        ({"name": "a", "data": "x" * 262_143}, 413, "INFERPIPE_EVENT_MAX_BYTES"),
    ],
)
async def test_a_wrong_event_is_refused_in_words_with_all_that_came_with_it(
    api: Api, body: object, status: int, words: str
) -> None:
    await define(api, "any", "triggers: [{event: '*'}]\n" + ECHO)
    answer = await send(api, body)
    assert answer.status_code == status
    assert words in answer.json()["error"]
    assert answer.json()["status"] == status
    assert await started(api, "any") == []


async def test_bounds_are_reached_and_not_passed(api: Api) -> None:
    await define(api, "any", "triggers: [{event: big}]\n" + ECHO)
    assert len(await sent(api, [{"name": "a"}] * 500)) == 500
    await sent(api, {"name": "big", "data": "x" * 262_142})
    assert len(await started(api, "any")) == 1
    assert await sent(api, []) == []


async def test_who_may_send(api: Api) -> None:
    await define(api, "any", "triggers: [{event: '*'}]\n" + ECHO)
    for key in ("ip_unknown-unknown-unknown", "NO_EVENT_KEY_SET", "%20"):
        refused = await send(api, {"name": "a"}, key)
        assert (refused.status_code, refused.json()["code"]) == (401, "UNAUTHORIZED")
        assert isinstance(refused.json()["error"], str)
        assert ADMIN_KEY not in refused.text
    reader = (await api.new_key(Scope.READ))["Authorization"].removeprefix("Bearer ")
    assert (await send(api, {"name": "a"}, reader)).status_code == 403
    sender = (await api.new_key(Scope.EXECUTE))["Authorization"].removeprefix("Bearer ")
    elsewhere = await send(api, {"name": "a"}, sender, **{"X-Workspace-Id": "elsewhere"})
    assert elsewhere.status_code == 403
    assert await started(api, "any") == []
    assert (await send(api, {"name": "a"}, sender)).status_code == 200
    assert len(await started(api, "any")) == 1


async def test_the_sdks_own_key_is_the_developers(store_url: str, tmp_path: Path) -> None:
    async with running_api(store_url, tmp_path, dev=True) as api:
        assert (await send(api, {"name": "a"}, "NO_EVENT_KEY_SET")).status_code == 200
        assert (await send(api, {"name": "a"}, "wrong-key-of-somebody")).status_code == 401
        foreign = await send(api, {"name": "a"}, "NO_EVENT_KEY_SET", origin="https://evil.example")
        assert foreign.status_code == 401


async def test_another_workspace_is_not_heard_and_hears_nothing(api: Api) -> None:
    other = await api.new_workspace("second")
    await define(api, "mine", "triggers: [{event: '*'}]\n" + ECHO)
    await define(api, "theirs", "triggers: [{event: '*'}]\n" + ECHO, **other)
    key = other["Authorization"].removeprefix("Bearer ")
    await sent(api, {"name": "a", "id": "same"})
    assert (await send(api, {"name": "a", "id": "same"}, key)).status_code == 200
    assert len(await started(api, "mine")) == 1
    (theirs,) = await started(api, "theirs", **other)
    assert (await api.http.get(f"/v1/executions/{theirs['id']}")).status_code == 404


async def test_a_new_version_and_a_deletion_count_at_once(api: Api) -> None:
    await define(api, "w", "triggers: [{event: old}]\n" + ECHO)
    await sent(api, {"name": "old"})
    assert len(await started(api, "w")) == 1
    await define(api, "w", "triggers: [{event: new}]\n" + ECHO)
    await sent(api, [{"name": "old"}, {"name": "new"}])
    assert [one["workflowVersion"] for one in await started(api, "w")] == [1, 2]
    await define(api, "w", ECHO)
    await sent(api, {"name": "new"})
    assert len(await started(api, "w")) == 2
    await define(api, "w", "triggers: [{event: new}]\n" + ECHO)
    assert (await api.http.delete("/v1/workflows/w")).status_code == 204
    await sent(api, {"name": "new"})
    assert len(await started(api, "w")) == 2


async def test_an_overridden_shipped_workflow_keeps_none_of_its_triggers(api: Api) -> None:
    catalog, other = api.services.catalog, await api.new_workspace("second")
    steps = [{"id": "a", "echo": {}}]
    await catalog.define(
        "_shipped", {"id": "shipped", "triggers": [{"event": "n"}], "steps": steps}
    )
    catalog._triggered.drop("default")
    await define(api, "shipped", ECHO)
    await sent(api, {"name": "n"})
    await send(api, {"name": "n"}, other["Authorization"].removeprefix("Bearer "))
    assert await started(api, "shipped") == []
    assert len(await started(api, "shipped", **other)) == 1


async def test_emit_feeds_the_same_path_and_a_circle_ends(api: Api) -> None:
    step = "{id: told, emit: {name: 'loop/{{ input.to }}', data: {to: '{{ input.to }}'}}}"
    await define(api, "circle", f"triggers: [{{event: 'loop/*'}}]\nsteps: [{step}]")
    body = {"workflowId": "circle", "input": {"to": "self"}}
    first = (await api.http.post("/v1/execute", json=body)).json()
    assert first["status"] == "completed", first
    async with asyncio.timeout(20):
        while len(records := await started(api, "circle")) < 21:
            await asyncio.sleep(0.01)
    assert [one["status"] for one in records] == ["completed"] * 20 + ["failed"]
    assert "at most 20 deep" in records[-1]["error"]
    assert records[0]["trigger"]["type"] == "api"
    assert {one["trigger"]["type"] for one in records[1:]} == {"event"}


async def test_what_would_be_refused_is_there_with_its_reason(api: Api) -> None:
    await define(
        api,
        "strict",
        "triggers: [{event: n}]\ninput: {required: [text]}\nconcurrency: {limit: 1, key: input.k}\n"
        "rateLimit: {requests: 2, window: 1h}\n" + ECHO,
    )
    await sent(api, {"name": "n", "id": "e1", "data": {"k": 1}})
    await sent(api, {"name": "n", "id": "e2", "data": {"text": "t"}})
    bad_input, no_key = await started(api, "strict")
    assert (bad_input["status"], bad_input["errorCode"]) == ("failed", "INVALID_INPUT")
    assert "text" in bad_input["error"]
    assert (no_key["errorCode"], no_key["steps"]) == ("INVALID_INPUT", [])
    retry = await api.http.post(f"/v1/executions/{bad_input['id']}/retry")
    assert (retry.status_code, retry.json()["code"]) == (422, "INVALID_INPUT")
    for index in range(4):
        await sent(api, {"name": "n", "id": f"f{index}", "data": {"text": "t", "k": index}})
        await carried_out(api)
    await asyncio.sleep(0)
    ended = [one async for one in ended_of(api, "strict", 4)]
    assert ended.count("RATE_LIMIT_EXCEEDED") == 2


async def ended_of(api: Api, workflow_id: str, count: int) -> AsyncIterator[str | None]:
    """The error codes of the latest executions, of those that have ended or started."""
    items = (await api.http.get(f"/v1/executions?workflowId={workflow_id}")).json()["items"]
    async with asyncio.timeout(20):
        for item in items[:count]:
            while (record := (await api.http.get(f"/v1/executions/{item['id']}")).json())[
                "status"
            ] == "pending":
                await asyncio.sleep(0.01)
            yield record["errorCode"]


async def test_a_crash_between_acceptance_and_the_starts_loses_and_doubles_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start dies once before it is made and once after; the message stays, and comes again."""
    for name in ("one", "two", "three"):
        await define(api, name, "triggers: [{event: n}]\n" + ECHO)
    start, died = TriggeredStarts.start, dict.fromkeys(("before", "after"), 0)

    async def dying(self: TriggeredStarts, wish: Any) -> bool:
        died["before"] += 1
        if died["before"] <= 3:
            raise StoreUnavailableError("killed before")
        made = await start(self, wish)
        died["after"] += 1
        if died["after"] <= 3:
            raise StoreUnavailableError("killed after")
        return made

    monkeypatch.setattr(TriggeredStarts, "start", dying)
    await sent(api, [{"name": "n", "id": "e1"}, {"name": "n", "id": "e2"}])
    for name in ("one", "two", "three"):
        records = await started(api, name)
        assert sorted(one["data"]["event"]["id"] for one in records) == ["e1", "e2"]
    assert died["before"] > 6


async def test_a_workflow_that_cannot_be_started_holds_up_no_other(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("broken", "sound"):
        await define(api, name, "triggers: [{event: n}]\n" + ECHO)
    start = TriggeredStarts.start

    async def breaking(self: TriggeredStarts, wish: Any) -> bool:
        if wish.workflow.id == "broken":
            raise KeyError("a fault of ours")
        return await start(self, wish)

    monkeypatch.setattr(TriggeredStarts, "start", breaking)
    await sent(api, {"name": "n"})
    assert len(await started(api, "sound")) == 1
    assert await started(api, "broken") == []


async def test_two_who_carry_the_same_event_out_start_once(api: Api) -> None:
    await define(api, "w", "triggers: [{event: n}]\n" + ECHO)
    event = AppEvent("default", "n", "e1", {}, 1)
    message = event_message(event, PARTITIONS)
    out = Outgoing("x", message.target_partition, FAN_OUT_LOG, message.body)
    store = api.services.executions._store
    outcomes = await asyncio.gather(*(store.send(out) for _ in range(8)))
    assert sorted(outcomes) == [False] * 7 + [True]
    assert len(await started(api, "w")) == 1


async def test_a_full_topic_says_so_and_takes_a_repeat(api: Api) -> None:
    events = api.services.events
    event = AppEvent("default", "n", "e1", {}, 1)
    assert await events._store.publish(event, 1)
    full = await asyncio.gather(
        *(events._store.publish(AppEvent("default", "n", f"f{n}", {}, 1), 0) for n in range(2)),
        return_exceptions=True,
    )
    assert {type(one).__name__ for one in full} == {"OverloadedError"}
    assert await events._store.publish(event, 0) is False


async def test_the_log_of_a_workspace_is_cut(store_url: str, tmp_path: Path) -> None:
    async with running_api(store_url, tmp_path, events_kept_max=400) as api:
        for _ in range(4):
            await sent(api, [{"name": "n"}] * 200)
        calls, topic = api.services.executions._store._calls, AppEvent("default", "n", "", {}, 1)
        key = f"ip:{{{event_message(topic, PARTITIONS).target_partition}}}:ev:default"
        assert 100 <= await calls.call("XLEN", key) <= 300  # whole nodes of 100 go
        assert 0 < await calls.call("PTTL", key) <= 86_400_000

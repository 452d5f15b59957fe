"""The usage ledger: counted once, with what ends an execution; by workflow, key and day."""

import asyncio
from collections.abc import AsyncGenerator
from functools import reduce

import pytest

from serve_app.adapters.redis_usage import RedisUsage
from serve_app.core import journal
from serve_app.core.errors import StepFailedError
from serve_app.core.execution import (
    ExecutionCompleted,
    ExecutionCreated,
    ExecutionStarted,
    StepCompleted,
    StepRetrying,
    StepStarted,
    evolve,
)
from serve_app.core.inference import Chunk, FinishReason, GenerationRequest, Grant, Usage
from serve_app.core.usage import Spending, Waste, day_of
from tests.integration.conftest import PARTITIONS, StoreBench
from tests.support.api import Api, ScriptedPlane

CHAT = {"workflowId": "chat-assistant", "input": {"messages": [{"role": "user", "content": "hi"}]}}
ECHO = {"workflowId": "test-echo", "input": {}}
ONE = {"promptTokens": 11, "cachedTokens": 4, "completionTokens": 3, "totalTokens": 14}


async def test_each_end_is_counted_by_workflow_key_and_day(api: Api) -> None:
    other_key = await api.new_key("execute")
    for headers in ({}, other_key):
        assert (await api.http.post("/v1/execute", json=CHAT, headers=headers)).status_code == 200
    await api.http.post("/v1/execute", json=ECHO)

    by_workflow = (await api.http.get("/v1/usage")).json()
    chat, echo = by_workflow["items"]
    assert (chat["workflow"], chat["requests"], chat["totalTokens"]) == ("chat-assistant", 2, 28)
    assert (echo["workflow"], echo["requests"], echo["totalTokens"]) == ("test-echo", 1, 0)
    assert by_workflow["totals"]["requests"] == 3
    assert by_workflow["totals"]["wastedTokens"] == 0

    keys = {i["id"]: i["name"] for i in (await api.http.get("/v1/keys")).json()["items"]}
    by_key = (await api.http.get("/v1/usage", params={"groupBy": "key"})).json()["items"]
    assert {keys[item["key"]]: item["requests"] for item in by_key} == {"first key": 2, "t": 1}
    assert {name: by_key[1][name] for name in ONE} == ONE

    today = day_of(api.services.clock.now_ms()).isoformat()
    [day] = (await api.http.get("/v1/usage", params={"groupBy": "day"})).json()["items"]
    assert (day["day"], day["requests"]) == (today, 3)
    long_ago = {"from": "2020-01-01", "to": "2020-12-31"}
    assert (await api.http.get("/v1/usage", params=long_ago)).json()["items"] == []
    other = await api.new_workspace("second")
    assert (await api.http.get("/v1/usage", headers=other)).json()["items"] == []


async def test_tokens_of_a_cancelled_step_are_wasted(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    async def hang(
        _: ScriptedPlane, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        yield Chunk("a", (1,), usage=Usage(11, 1, 4))
        begun.set()
        await never.wait()

    monkeypatch.setattr(ScriptedPlane, "generate", hang)
    execution_id = (await api.http.post("/v1/execute/async", json=CHAT)).json()["id"]
    await begun.wait()
    await api.http.post(f"/v1/executions/{execution_id}/cancel")
    await api.http.get(f"/v1/executions/{execution_id}/stream")  # until it has ended
    totals = (await api.http.get("/v1/usage")).json()["totals"]
    assert (totals["requests"], totals["wasted"]) == (1, {"cancelled": 12})


async def test_tokens_of_a_failed_attempt_are_wasted_although_the_next_one_succeeds(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def fail_once(
        _: ScriptedPlane, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        nonlocal tries
        tries += 1
        yield Chunk("a", (1,), usage=Usage(11, 1, 4))
        if tries == 1:
            raise StepFailedError("not this time")
        yield Chunk("b", (2, 3), FinishReason.STOP, Usage(11, 3, 4))

    monkeypatch.setattr(ScriptedPlane, "generate", fail_once)
    wish = {**CHAT, "retryConfig": {"attempts": 1, "backoff": "fixed", "maxDelay": 1}}
    assert (await api.http.post("/v1/execute", json=wish)).json()["status"] == "completed"
    totals = (await api.http.get("/v1/usage")).json()["totals"]
    assert (totals["totalTokens"], totals["wasted"]) == (12 + 14, {"retried": 12})


@pytest.mark.parametrize(
    "query",
    [
        {"from": "yesterday"},
        {"from": "2026-02-30"},
        {"to": "0001-01-02"},
        {"to": "0001-01-01T00:00:00+14:00"},
        {"from": "2026-02-02", "to": "2026-02-01"},
        {"from": "2024-01-01", "to": "2026-01-01"},
        {"groupBy": "planet"},
    ],
)
async def test_a_query_that_makes_no_sense_is_refused(api: Api, query: dict[str, str]) -> None:
    answer = await api.http.get("/v1/usage", params=query)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["loc"][0] == "query"


async def test_a_call_is_counted_once_however_often_it_is_sent(bench: StoreBench) -> None:
    ledger = RedisUsage(bench.calls, partition_count=PARTITIONS, kept_ms=60_000)
    call = Spending("c1", "w", "openai:chat", "k1", 0, Usage(5, 2, 1), 7, Waste.CANCELLED)
    for _ in range(3):
        await ledger.add(call)
    day = day_of(0)
    [row] = await ledger.rows("w", day, day)
    assert (row.requests, row.usage, row.wasted) == (1, Usage(5, 2, 1), {"cancelled": 7})
    assert await ledger.spent_tokens("w", "k1") == 7
    assert await ledger.spent_tokens("other", "k1") == 0
    [name] = await bench.keys("*:use:*")
    assert 0 < await bench.client.pttl(name) <= 60_000


async def test_an_end_that_is_committed_twice_is_counted_once(bench: StoreBench) -> None:
    created = ExecutionCreated(1_000, "w", "chat", 1, {}, key_id="k1")
    execution_id = journal.execution_id(1, "one")
    await bench.store.create(execution_id, created, "create", "ingress")
    [owned] = await bench.store.claim(1, "worker", 1)
    events = (
        ExecutionStarted(1_001),
        StepStarted(1_002, "a", 1),
        StepRetrying(1_003, "a", 2, 1, 1_003, "lost", Usage(5, 2, 0)),
        StepStarted(1_004, "a", 2),
        StepCompleted(1_005, "a", "text", Usage(5, 4, 3)),
        ExecutionCompleted(1_006, "text"),
    )
    after = reduce(evolve, events, owned.execution)
    commit = journal.Commit("c1", owned.token, owned.execution, after, events)
    answers = [await bench.store.commit(commit) for _ in range(3)]
    assert [type(answer) for answer in answers] == [
        journal.Committed,
        journal.Conflict,
        journal.Conflict,
    ]
    ledger = RedisUsage(bench.calls, partition_count=PARTITIONS, kept_ms=60_000)
    [row] = await ledger.rows("w", day_of(1_006), day_of(1_006))
    assert (row.requests, row.usage, row.wasted) == (1, Usage(10, 6, 3), {"retried": 7})
    assert await ledger.spent_tokens("w", "k1") == 16

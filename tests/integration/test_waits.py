"""Waiting and signals over HTTP and a real store: parked, answered, and answered once."""

import asyncio
from typing import Any

import httpx
import yaml

from tests.support.api import Api
from tests.support.checker import entries_of_stored, journal_problems

ASK = """
steps:
  - {id: ask, approval: {message: "Ship it?", timeout: 1h}}
  - {id: nap, sleep: 50ms}
  - id: each
    map: {over: "{{ input.list }}", steps: [{id: one, transform: "{{ item + 1 }}"}]}
output: {answer: "{{ steps.ask.output }}", items: "{{ steps.each.output }}"}
"""


async def started(api: Api, definition: str = ASK) -> str:
    put = await api.http.put("/v1/workflows/ask", json=yaml.safe_load(definition))
    assert put.status_code in (200, 201), put.text
    body = {"workflowId": "ask", "input": {"list": [1, 2]}}
    return (await api.http.post("/v1/execute/async", json=body)).json()["id"]


async def until(api: Api, execution_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            record = (await api.http.get(f"/v1/executions/{execution_id}")).json()
            if record["status"] in statuses:
                return record
            await asyncio.sleep(0.02)


async def signal(api: Api, execution_id: str, body: object, **headers: str) -> httpx.Response:
    path = f"/v1/executions/{execution_id}/signal"
    return await api.http.post(path, json=body, headers=headers)


async def test_a_parked_execution_is_woken_by_a_signal_and_by_its_timer(api: Api) -> None:
    execution_id = await started(api)
    record = await until(api, execution_id, "waiting")
    assert record["steps"][0]["waiting"]["message"] == "Ship it?"
    answer = await signal(api, execution_id, {"name": "ask", "data": {"approved": True}})
    assert (answer.status_code, answer.json()["id"]) == (202, execution_id)
    record = await until(api, execution_id, "completed", "failed")
    assert record["data"] == {
        "answer": {"approved": True, "data": {"approved": True}},
        "items": [2, 3],
    }
    journal = await api.services.executions._store.read(execution_id, 0, 1000)
    assert journal_problems(entries_of_stored(journal)) == []


async def test_a_repeated_signal_is_received_once(api: Api) -> None:
    execution_id = await started(api)
    body, headers = {"name": "later", "data": 1}, {"Idempotency-Key": "k1"}
    first = await signal(api, execution_id, body, **headers)
    again = await signal(api, execution_id, body, **headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.headers["idempotency-replayed"] == "true"
    other = await signal(api, execution_id, {"name": "later", "data": 2}, **headers)
    assert other.json()["code"] == "IDEMPOTENCY_CONFLICT"
    execution = await api.services.executions.load("default", execution_id)
    assert [kept.data for kept in execution.signals] == [1]


async def test_a_signal_nobody_can_take_is_refused(api: Api) -> None:
    unknown = await signal(api, "exe_00unknown", {"name": "ask"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "UNKNOWN_EXECUTION")
    execution_id = await started(api)
    for body in ({}, {"name": ""}, {"name": 3}, {"name": "ask", "extra": 1}):
        assert (await signal(api, execution_id, body)).status_code == 422
    large = await signal(api, execution_id, {"name": "ask", "data": "x" * 70_000})
    assert (large.status_code, large.json()["code"]) == (413, "BODY_TOO_LARGE")
    await api.http.post(f"/v1/executions/{execution_id}/cancel")
    await until(api, execution_id, "cancelled")
    late = await signal(api, execution_id, {"name": "ask"})
    assert (late.status_code, late.json()["code"]) == (409, "ALREADY_TERMINAL")


async def test_a_readers_key_and_another_workspace_cannot_signal(api: Api) -> None:
    execution_id = await started(api)
    reader = await api.new_key("read")
    assert (await signal(api, execution_id, {"name": "ask"}, **reader)).status_code == 403
    stranger = await api.new_workspace("other")
    assert (await signal(api, execution_id, {"name": "ask"}, **stranger)).status_code == 404


async def test_a_hundred_parked_executions_all_wake(api: Api) -> None:
    nap = "steps: [{id: nap, sleep: 300ms}]"
    ids = [await started(api, nap) for _ in range(100)]
    records = [await until(api, one, "completed", "failed") for one in ids]
    assert {record["status"] for record in records} == {"completed"}

"""Workflows that start workflows, over HTTP and a real store."""

import asyncio
from typing import Any

import pytest
import yaml

from tests.support.api import Api
from tests.support.checker import entries_of_stored, journal_problems

CHILDREN = {
    "double": "input: {required: [n]}\nsteps: [{id: d, transform: '{{ input.n * 2 }}'}]",
    "broken": "steps: [{id: d, transform: '{{ input.nothing }}'}]",
    "nap": "steps: [{id: d, sleep: 1h}]",
    "again": "steps: [{id: d, workflow: {id: again, input: {}}}]",
}


async def define(api: Api, name: str, text: str) -> None:
    put = await api.http.put(f"/v1/workflows/{name}", json=yaml.safe_load(text))
    assert put.status_code in (200, 201), put.text


@pytest.fixture
async def defined(api: Api) -> Api:
    for name, text in CHILDREN.items():
        await define(api, name, text)
    return api


async def start(api: Api, steps: str, **members: object) -> str:
    await define(api, "parent", steps)
    body = {"workflowId": "parent", "input": {"list": [1, 2, 3]}, **members}
    return (await api.http.post("/v1/execute/async", json=body)).json()["id"]


async def until(api: Api, execution_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            record = (await api.http.get(f"/v1/executions/{execution_id}")).json()
            if record["status"] in statuses:
                return record
            await asyncio.sleep(0.02)


ENDED = ("completed", "failed", "cancelled")


async def check(api: Api, execution_id: str) -> None:
    journal = await api.services.executions._store.read(execution_id, 0, 10_000)
    assert journal_problems(entries_of_stored(journal)) == []


async def listed(api: Api, workflow_id: str) -> list[dict[str, Any]]:
    query = f"/v1/executions?workflowId={workflow_id}"
    return (await api.http.get(query)).json()["items"]


async def test_a_childs_data_is_the_steps_output(defined: Api) -> None:
    steps = """
    steps:
      - id: each
        map:
          over: "{{ input.list }}"
          steps: [{id: child, workflow: {id: double, input: {n: "{{ item }}"}}}]
    """
    record = await until(defined, await start(defined, steps), *ENDED)
    assert (record["status"], record["data"]) == ("completed", [2, 4, 6]), record
    assert [item["status"] for item in await listed(defined, "double")] == ["completed"] * 3
    await check(defined, record["id"])


async def test_a_childs_failure_is_the_steps(defined: Api) -> None:
    steps = "steps: [{id: child, workflow: {id: broken, input: {}}}]"
    record = await until(defined, await start(defined, steps), *ENDED)
    assert (record["status"], record["errorCode"]) == ("failed", "STEP_FAILED")
    (item,) = await listed(defined, "broken")
    assert record["error"].startswith(f"step child: broken ({item['id']}): step d: ")
    await check(defined, record["id"])


@pytest.mark.parametrize(
    ("workflow_id", "words"),
    [("unknown", "no workflow"), ("double", "double input"), ("again", "at most 5 deep")],
)
async def test_a_child_that_cannot_start_fails_the_step(
    defined: Api, workflow_id: str, words: str
) -> None:
    steps = f"steps: [{{id: child, workflow: {{id: {workflow_id}, input: {{}}}}}}]"
    record = await until(defined, await start(defined, steps), *ENDED)
    assert record["status"] == "failed"
    assert words in record["error"]


async def test_a_waiting_parent_is_parked_and_its_cancel_reaches_the_child(defined: Api) -> None:
    steps = "steps: [{id: child, workflow: {id: nap, input: {}}}]"
    execution_id = await start(defined, steps)
    record = await until(defined, execution_id, "waiting")
    child = record["steps"][0]["waiting"]["event"]
    await until(defined, child, "waiting")
    await defined.http.post(f"/v1/executions/{execution_id}/cancel")
    assert (await until(defined, execution_id, *ENDED))["status"] == "cancelled"
    assert (await until(defined, child, *ENDED))["status"] == "cancelled"
    await check(defined, child)


async def test_a_child_has_its_parents_deadline_at_most(defined: Api) -> None:
    steps = "steps: [{id: child, workflow: {id: nap, input: {}}}]"
    execution_id = await start(defined, steps, timeout=700)
    record = await until(defined, execution_id, *ENDED)
    assert (record["status"], record["errorCode"]) == ("failed", "TIMEOUT")
    (item,) = await listed(defined, "nap")
    assert (await until(defined, item["id"], *ENDED))["status"] in ("failed", "cancelled")


async def test_a_sibling_that_fails_stops_the_child(defined: Api) -> None:
    steps = """
    steps:
      - id: both
        parallel:
          branches:
            left: [{id: child, workflow: {id: nap, input: {}}}]
            right: [{id: pause, sleep: 300ms}, {id: bad, transform: "{{ input.nothing }}"}]
    """
    record = await until(defined, await start(defined, steps), *ENDED)
    assert "both/right/bad" in record["error"]
    (item,) = await listed(defined, "nap")
    assert (await until(defined, item["id"], *ENDED))["status"] == "cancelled"


async def test_nobody_can_say_that_a_child_has_ended(defined: Api) -> None:
    steps = "steps: [{id: child, workflow: {id: nap, input: {}}}]"
    execution_id = await start(defined, steps)
    record = await until(defined, execution_id, "waiting")
    body = {"name": record["steps"][0]["waiting"]["event"], "data": {"status": "completed"}}
    answer = await defined.http.post(f"/v1/executions/{execution_id}/signal", json=body)
    assert answer.status_code == 422
    await defined.http.post(f"/v1/executions/{execution_id}/cancel")
    await until(defined, execution_id, *ENDED)


async def test_a_failed_child_is_followed_by_another(defined: Api) -> None:
    """The second is of the definition that stands by then."""
    steps = "steps: [{id: child, workflow: {id: broken, input: {}}, retry: {attempts: 3}}]"
    execution_id = await start(defined, steps)
    async with asyncio.timeout(20):
        while not [item for item in await listed(defined, "broken") if item["status"] == "failed"]:
            await asyncio.sleep(0.02)
    await define(defined, "broken", "steps: [{id: d, transform: '{{ 7 }}'}]")
    record = await until(defined, execution_id, *ENDED)
    assert (record["status"], record["data"]) == ("completed", 7), record
    assert record["steps"][0]["attempts"] == 2
    children = {item["id"]: item["status"] for item in await listed(defined, "broken")}
    assert sorted(children.values()) == ["completed", "failed"]
    await check(defined, execution_id)

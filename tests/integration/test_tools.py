"""Tools of a `generate` over HTTP and a real store: children, people, and workers that die."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.adapters.system import SystemClock
from serve_app.core.inference import JsonValue
from serve_app.core.journal import execution_id
from serve_app.ports import StepCall, StepType
from serve_app.services.executions import Submission
from serve_app.services.inference import Inference
from tests.support.api import Api, running_api
from tests.support.checker import entries_of_stored, journal_problems
from tests.support.definitions import Model
from tests.support.harness import Harness

ENDED = ("completed", "failed", "cancelled")


def a_call(name: str, **arguments: JsonValue) -> str:
    return json.dumps({"tool_call": {"name": name, "arguments": arguments}})


def asking(*tools: dict[str, Any]) -> dict[str, Any]:
    described = [
        {"description": "A tool.", "parameters": {"type": "object"}, **one} for one in tools
    ]
    return {"steps": [{"id": "ask", "generate": {"prompt": "{{ input.q }}", "tools": described}}]}


DOUBLE = {"name": "double", "step": {"workflow": {"id": "double", "input": "{{ args }}"}}}
PERSON = {"name": "person", "step": {"approval": {"message": "{{ args.q }}", "timeout": "1h"}}}


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def api(valkey_url: str, tmp_path: Path, model: Model) -> AsyncIterator[Api]:
    inference = Inference(model, model, SystemClock(), resume_wait_s=1.0)
    async with running_api(valkey_url, tmp_path, inference) as running:
        child = {
            "input": {"required": ["n"]},
            "steps": [{"id": "d", "transform": "{{ input.n * 2 }}"}],
        }
        await running.http.put("/v1/workflows/double", json=child)
        put = await running.http.put("/v1/workflows/asking", json=asking(DOUBLE, PERSON))
        assert put.status_code == 201, put.text
        yield running


async def start(api: Api, **members: object) -> str:
    body = {"workflowId": "asking", "input": {"q": "?"}, **members}
    return (await api.http.post("/v1/execute/async", json=body)).json()["id"]


async def until(api: Api, execution_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            record = (await api.http.get(f"/v1/executions/{execution_id}")).json()
            if record["status"] in statuses:
                return record
            await asyncio.sleep(0.02)


async def test_another_workflow_may_be_a_tool(api: Api, model: Model) -> None:
    model.replies = [a_call("double"), a_call("double", n=21), "It is 42."]
    record = await until(api, await start(api), *ENDED)
    assert (record["status"], record["data"]) == ("completed", "It is 42."), record
    assert "input.n: is required" in model.heard[1]
    assert model.heard[2] == "Result of double:\n42"
    steps = {step["id"]: (step["type"], step["status"]) for step in record["steps"]}
    assert steps == {
        "ask": ("generate", "completed"),
        "ask/0/ask.model": ("generate", "completed"),
        "ask/0/ask.double": ("workflow", "failed"),
        "ask/1/ask.model": ("generate", "completed"),
        "ask/1/ask.double": ("workflow", "completed"),
        "ask/2/ask.model": ("generate", "completed"),
    }
    assert record["usage"]["promptTokens"] == 30
    journal = await api.services.executions._store.read(record["id"], 0, 1000)
    assert journal_problems(entries_of_stored(journal)) == []


async def test_a_person_may_be_a_tool_and_holds_no_worker(api: Api, model: Model) -> None:
    model.replies = [a_call("person", q="May I?"), "They agreed."]
    execution_id = await start(api)
    record = await until(api, execution_id, "waiting")
    (waiting,) = [step for step in record["steps"] if step["status"] == "waiting"]
    assert (waiting["id"], waiting["waiting"]["message"]) == ("ask/0/ask.person", "May I?")
    await api.http.post(
        f"/v1/executions/{execution_id}/signal", json={"name": "ask.person", "data": True}
    )
    record = await until(api, execution_id, *ENDED)
    assert record["data"] == "They agreed."
    assert model.heard[1] == 'Result of person:\n{"approved": true, "data": true}'


async def test_the_deadline_ends_a_call_and_its_child(api: Api, model: Model) -> None:
    model.replies = [a_call("person", q="?")]
    record = await until(api, await start(api, timeout=300), *ENDED)
    assert (record["status"], record["errorCode"]) == ("failed", "TIMEOUT")


async def test_a_stream_has_the_answer_and_no_call(api: Api, model: Model) -> None:
    model.replies = [a_call("double", n=1), "Two of them."]
    body = {"workflowId": "asking", "input": {"q": "?"}}
    said: list[str] = []
    async with api.http.stream("POST", "/v1/execute/stream", json=body) as stream:
        event = ""
        async for line in stream.aiter_lines():
            name, _, value = line.partition(": ")
            event = value if name == "event" else event
            if (name, event) == ("data", "chunk"):
                said.append(json.loads(value)["data"])
    assert "".join(said) == "Two of them."


async def test_a_worker_killed_in_a_call_costs_that_call_alone(valkey_url: str) -> None:
    calls: list[str] = []
    is_called = asyncio.Event()

    async def look_up(call: StepCall) -> JsonValue:
        calls.append(call.idempotency_key.partition("/")[2])
        if len(calls) == 2:
            is_called.set()
            await asyncio.Event().wait()
        return "found"

    model = Model(a_call("find", n=1), a_call("find", n=2), "Found both.")
    types = {"generate": model.step_type, "work": StepType(check=lambda _: (), run=look_up)}
    definition = {"id": "asking", **asking({"name": "find", "step": {"work": {}}})}
    harness = Harness(valkey_url, types, [definition])
    try:
        async with asyncio.timeout(20), harness.surface() as (executions, _):
            first = await harness.start_executor("w1")
            started = await executions.start(
                Submission(execution_id(0, "tools"), "t", "asking", {"q": "?"})
            )
            an_id = started.execution.id
            await is_called.wait()

            async def nothing() -> None:
                """As kill -9: nothing is handed over."""

            first._hand_over = nothing  # type: ignore[method-assign]
            await harness.stop_executor("w1")
            await harness.start_executor("w2")
            while not (state := await executions._store.load(an_id)).is_terminal:
                await asyncio.sleep(0.02)
        assert state.data == "Found both."
        assert calls == ["ask/0/ask.find/1", "ask/1/ask.find/1", "ask/1/ask.find/1"]
        assert len(model.asked) == 3
        journal = await executions._store.read(an_id, 0, 1000)
        assert journal_problems(entries_of_stored(journal)) == []
    finally:
        await harness.close()

"""What the contract promises for every route: errors, ids, origins, bounds, streams."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from serve_app.core.inference import Chunk, FinishReason, GenerationRequest, Grant, Usage
from tests.support.api import ADMIN_KEY, Api, ScriptedPlane, running_api
from tests.support.openapi import openapi_document

ECHO = {"workflowId": "test-echo", "input": {"a": 1}}
CHAT = {"workflowId": "chat-assistant", "input": {"messages": [{"role": "user", "content": "hi"}]}}
# Refused before their body is read where no model is served; tests/integration/test_openai.py.
NEEDS_A_MODEL = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"}
MEMBERS = {"type", "title", "status", "detail", "code", "requestId"}
TAKES_JSON = [
    (method.upper(), path)
    for path, operations in openapi_document()["paths"].items()
    for method, operation in operations.items()
    if "application/json" in operation.get("requestBody", {}).get("content", {})
]


@pytest.fixture
def unmade() -> dict[str, str]:
    """Ids of nothing: a body is looked at before what it is for."""
    ids = {"workflow_id": "w", "webhook_id": "w", "execution_id": "e", "session_id": "s"}
    return {**ids, "event_key": ADMIN_KEY}


async def test_every_body_is_bounded_and_must_be_json(
    valkey_url: str, tmp_path: Path, unmade: dict[str, str]
) -> None:
    size_max, depth_max = 2048, 8
    bounds = {"body_max_bytes": size_max, "json_depth_max": depth_max}
    deep = b'{"a":' * (depth_max + 1) + b"1" + b"}" * (depth_max + 1)
    async with running_api(valkey_url, tmp_path, **bounds) as api:
        for method, path in TAKES_JSON:
            if path in NEEDS_A_MODEL or path.startswith("/hooks/"):  # test_hooks.py
                continue
            url = path.format(**unmade)
            for body, status, code in (
                (b"{", 400, "MALFORMED_JSON"),
                (b'{"a": "\xff"}', 400, "MALFORMED_JSON"),
                (b'{"a": NaN}', 400, "MALFORMED_JSON"),
                (deep, 400, "MALFORMED_JSON"),
                (b" " * (1 << 20), 413, "BODY_TOO_LARGE"),
            ):
                answer = await api.http.request(method, url, content=body)
                assert (answer.status_code, answer.json()["code"]) == (status, code), (
                    path,
                    body[:20],
                )


async def test_a_refusal_is_problem_details(api: Api) -> None:
    named = {"X-Request-Id": "named-by-the-caller"}
    wish = {"workflowId": "", "input": [], "timeout": 0}
    answer = await api.http.post("/v1/execute", json=wish, headers=named)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem.keys() == MEMBERS | {"errors"}
    assert (problem["status"], problem["code"]) == (422, "INVALID_REQUEST")
    assert problem["requestId"] == answer.headers["X-Request-Id"] == "named-by-the-caller"
    assert {tuple(error["loc"]) for error in problem["errors"]} == {
        ("body", "workflowId"),
        ("body", "input"),
        ("body", "timeout"),
    }
    assert all(error["msg"] for error in problem["errors"])


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "NOT_FOUND"),
        ("DELETE", "/v1/execute", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/v1/executions/exe_00x", 404, "UNKNOWN_EXECUTION"),
        ("GET", "/v1/executions?limit=0", 422, "INVALID_REQUEST"),
        ("GET", "/v1/executions?limit=000000001999", 422, "INVALID_REQUEST"),
        ("GET", "/v1/executions?limit=\u0661", 422, "INVALID_REQUEST"),
        ("GET", "/v1/executions?cursor=x", 400, "INVALID_CURSOR"),
        ("GET", "/v1/executions?status=odd", 422, "INVALID_REQUEST"),
    ],
)
async def test_refusals_have_their_code(
    api: Api, method: str, path: str, status: int, code: str
) -> None:
    answer = await api.http.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json().keys() >= MEMBERS


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "caf\xe9", "<script>"])
async def test_a_request_id_that_is_none_is_replaced(api: Api, sent: str) -> None:
    raw = [(b"x-request-id", sent.encode("latin-1"))]
    answer = await api.http.get("/v1/health", headers=raw)
    assert answer.headers["X-Request-Id"] not in {"", sent}


async def test_what_nobody_caught_is_told_in_general_words(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_down(_: str) -> None:
        raise RuntimeError("a detail of ours")

    monkeypatch.setattr(api.services.keys, "records", break_down)
    answer = await api.http.get("/v1/keys")
    assert (answer.status_code, answer.json()["code"]) == (500, "INTERNAL")
    assert answer.json()["requestId"] == answer.headers["X-Request-Id"]
    assert "a detail of ours" not in answer.text
    assert "Traceback" not in answer.text


async def test_no_other_origin_reads_unless_it_is_named(valkey_url: str, tmp_path: Path) -> None:
    asked = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    async with running_api(valkey_url, tmp_path) as api:
        for answer in (
            await api.http.get("/v1/health", headers=asked),
            await api.http.options("/v1/execute", headers=asked),
        ):
            assert "Access-Control-Allow-Origin" not in answer.headers
    async with running_api(valkey_url, tmp_path, cors_origins="https://app.example.com") as api:
        preflight = await api.http.options("/v1/execute", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
        answer = await api.http.get("/v1/health", headers=asked)
        shown = answer.headers["Access-Control-Expose-Headers"]
        for name in ("X-Request-Id", "X-Execution-Id", "RateLimit-Remaining", "Retry-After"):
            assert name in shown
        foreign = {**asked, "Origin": "https://other.example.com"}
        refused = await api.http.options("/v1/execute", headers=foreign)
        assert "Access-Control-Allow-Origin" not in refused.headers


async def test_a_stream_is_resumed_where_it_stopped(api: Api) -> None:
    result = (await api.http.post("/v1/execute", json=ECHO)).json()
    path = f"/v1/executions/{result['id']}/stream"

    async def events(query: str = "", **headers: str) -> tuple[int, list[str]]:
        answer = await api.http.get(path + query, headers=headers)
        return answer.status_code, [
            line.removeprefix("id: ") for line in answer.text.splitlines() if line.startswith("id")
        ]

    status, ids = await events()
    assert status == 200
    assert ids == sorted(ids, key=int)
    assert await events(f"?after={ids[0]}") == (200, ids[1:])
    assert await events(f"?after={ids[-1]}", **{"Last-Event-ID": ids[0]}) == (200, ids[1:])
    assert await events(**{"Last-Event-ID": ids[-1]}) == (204, [])
    beyond = await api.http.get(f"{path}?after=900")
    assert beyond.text.startswith("event: gap\n")
    assert '"requested":900' in beyond.text
    for cursor in ("x", "-1", "1.5", "9" * 16):
        refused = await api.http.get(path, params={"after": cursor})
        assert (refused.status_code, refused.json()["code"]) == (400, "INVALID_CURSOR")


async def test_a_silent_stream_shows_that_it_lives(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def late(
        _: ScriptedPlane, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        await go_on.wait()
        yield Chunk("late", (1,), FinishReason.STOP, Usage(1, 1))

    monkeypatch.setattr(ScriptedPlane, "generate", late)
    async with running_api(valkey_url, tmp_path, keep_alive_s=0.02) as api:
        started = await api.http.post("/v1/execute/async", json=CHAT)
        path = f"/v1/executions/{started.json()['id']}/stream"
        reading = asyncio.ensure_future(api.http.get(path))
        while not (await api.http.get(path.removesuffix("/stream"))).json()["startedAt"]:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)  # five times the silence that is allowed
        go_on.set()
        text = (await reading).text
    assert text.count(": keep-alive\n\n") >= 2
    assert "event: execution.completed" in text


async def test_health_names_what_is_down(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/health", "/v1/health"):
        body: dict[str, Any] = (await api.http.get(path)).json()
        assert body["status"] == "healthy"
        assert body["version"]
        assert body["services"].keys() == {"redis", "workflow_engine", "models"}
    await api.lose_the_store(monkeypatch)
    answer = await api.http.get("/v1/health")
    assert answer.status_code == 503
    body = answer.json()
    assert body["services"].keys() == {"redis", "workflow_engine", "models"}
    assert (body["status"], body["services"]["redis"]["status"]) == ("unhealthy", "down")

"""The native API over HTTP: what it does, and what it refuses and how."""

import json
import time
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import API_KEY, Service

ECHO = {"workflowId": "test-echo", "input": {"message": "hello world"}}
CHAT = {
    "workflowId": "chat-assistant",
    "input": {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "maxTokens": 40},
}

STORY = {
    "messages": [{"role": "user", "content": "Tell me a very long story about a ship at sea."}],
    "temperature": 0,
    "maxTokens": 400,
}
LONG = {"workflowId": "chat-assistant", "input": STORY}


@pytest.fixture
def http(service: Service) -> Any:
    with httpx.Client(
        base_url=service.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=30
    ) as client:
        yield client


def events_of(text: str) -> list[tuple[int | None, str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line and line[0] != ":")
        if "data" in lines:
            seq = int(lines["id"]) if "id" in lines else None
            found.append((seq, lines["event"], json.loads(lines["data"])))
    return found


def wait_for(http: httpx.Client, execution_id: str, *statuses: str) -> dict[str, Any]:
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        record: dict[str, Any] = http.get(f"/v1/executions/{execution_id}").json()
        if record["status"] in statuses:
            return record
        time.sleep(0.01)
    raise AssertionError(f"{record['status']} is none of {statuses}")


def test_execute_answers_with_the_result(http: httpx.Client) -> None:
    answer = http.post("/v1/execute", json={**ECHO, "metadata": {"mine": 1}, "userId": "u1"})
    result = answer.json()
    assert answer.status_code == 200
    assert result["status"] == "completed"
    assert result["data"] == {"message": "hello world"}
    assert result["metadata"] == {"mine": 1}
    assert result["attempts"] == 1
    assert result["usage"] == {"promptTokens": 0, "completionTokens": 0, "totalTokens": 0}
    assert result["id"] == answer.headers["x-execution-id"]
    record = http.get(f"/v1/executions/{result['id']}").json()
    assert record["userId"] == "u1"
    assert record["progress"] == 100
    assert [(step["id"], step["type"], step["status"]) for step in record["steps"]] == [
        ("echo", "echo", "completed")
    ]


def test_async_is_durable_at_once_and_ends(http: httpx.Client) -> None:
    answer = http.post("/v1/execute/async", json=ECHO)
    assert answer.status_code == 202
    assert answer.json()["status"] == "pending"
    assert wait_for(http, answer.json()["id"], "completed")["data"] == ECHO["input"]


def test_stream_tells_the_whole_story(http: httpx.Client) -> None:
    answer = http.post("/v1/execute/stream", json=CHAT)
    events = events_of(answer.text)
    names = [name for _, name, _ in events]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert names[:2] == ["execution.started", "step.started"]
    assert names[-2:] == ["step.completed", "execution.completed"]
    assert set(names[2:-2]) == {"chunk"}
    text = "".join(data["data"] for _, name, data in events if name == "chunk")
    assert text.strip() == events[-1][2]["data"].strip()
    assert events[-1][2]["usage"]["completionTokens"] > 0
    ids = [seq for seq, _, _ in events]
    assert ids == sorted(ids)
    assert all(data["executionId"] == answer.headers["x-execution-id"] for _, _, data in events)
    assert all(data["timestamp"].endswith("Z") for _, _, data in events)


def test_resume_gives_what_the_cursor_has_not_seen(http: httpx.Client) -> None:
    first = http.post("/v1/execute/stream", json=CHAT)
    everything = events_of(first.text)
    stream = f"/v1/executions/{first.headers['x-execution-id']}/stream"
    for seq, _, _ in everything[:-1]:
        resumed = http.get(stream, headers={"Last-Event-ID": str(seq)}, params={"after": "1"})
        assert events_of(resumed.text) == [event for event in everything if event[0] > seq]
    assert events_of(http.get(stream).text) == everything
    assert http.get(stream, params={"after": everything[-1][0]}).status_code == 204


def test_a_cursor_beyond_the_end_gets_a_gap(http: httpx.Client) -> None:
    execution_id = http.post("/v1/execute", json=ECHO).json()["id"]
    events = events_of(http.get(f"/v1/executions/{execution_id}/stream?after=9999").text)
    assert [name for _, name, _ in events] == ["gap", "execution.completed"]
    assert events[0][2]["requested"] == 9999


def test_cancel_ends_a_generation(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/execute/stream", json=LONG) as answer:
        execution_id = answer.headers["x-execution-id"]
        body = ""
        asked = 0.0
        for part in answer.iter_text():
            body += part
            if "event: chunk" in body and not asked:
                assert http.post(f"/v1/executions/{execution_id}/cancel").status_code == 202
                asked = time.monotonic()
        took = time.monotonic() - asked
    events = events_of(body)
    assert events[-1][1] == "execution.cancelled"
    assert events[-1][2]["errorCode"] == "CANCELLED"
    assert 0 < events[-1][2]["usage"]["completionTokens"] < 400
    assert took < 2
    again = http.post(f"/v1/executions/{execution_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "ALREADY_TERMINAL")


def test_timeout_fails_the_execution(http: httpx.Client) -> None:
    result = http.post("/v1/execute", json={**LONG, "timeout": 60}).json()
    assert (result["status"], result["errorCode"]) == ("failed", "TIMEOUT")


def test_a_caller_that_leaves_cancels(http: httpx.Client, service: Service) -> None:
    body = {**LONG, "input": {**STORY, "maxTokens": 60}}
    key = {"Idempotency-Key": "leave-and-return"}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/execute", json=body, timeout=0.15, headers=key)
    kept = http.post("/v1/execute", json=body, headers=key)
    assert kept.json()["status"] == "completed"
    assert kept.headers["idempotency-replayed"] == "true"

    with service.watch_new_executions() as new_ids:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/execute", json=LONG, timeout=0.15)
        execution_id = new_ids()[0]
    assert wait_for(http, execution_id, "cancelled", "completed")["status"] == "cancelled"


def test_idempotency_key_gives_the_first_answer_again(http: httpx.Client) -> None:
    key = {"Idempotency-Key": "once-only"}
    first = http.post("/v1/execute", json=ECHO, headers=key)
    reordered = {"input": ECHO["input"], "workflowId": "test-echo"}
    second = http.post("/v1/execute", json=reordered, headers=key)
    assert second.json() == first.json()
    assert second.headers["idempotency-replayed"] == "true"
    other = http.post("/v1/execute", json={**ECHO, "input": {"x": 1}}, headers=key)
    assert (other.status_code, other.json()["code"]) == (409, "IDEMPOTENCY_CONFLICT")


DEEP = '{"workflowId": "test-echo", "input": ' + '{"a":' * 70 + "1" + "}" * 71

REFUSALS = [
    ("unknown workflow", b'{"workflowId": "nope", "input": {}}', 404, "UNKNOWN_WORKFLOW"),
    (
        "input against schema",
        b'{"workflowId": "chat-assistant", "input": {}}',
        422,
        "INVALID_INPUT",
    ),
    ("no input", b'{"workflowId": "test-echo"}', 422, "INVALID_REQUEST"),
    ("unknown member", b'{"workflowId": "test-echo", "input": {}, "x": 1}', 422, "INVALID_REQUEST"),
    (
        "negative timeout",
        b'{"workflowId":"test-echo","input":{},"timeout":-1}',
        422,
        "INVALID_REQUEST",
    ),
    ("zero timeout", b'{"workflowId":"test-echo","input":{},"timeout":0}', 422, "INVALID_REQUEST"),
    ("no JSON", b"{", 400, "MALFORMED_JSON"),
    ("empty", b"", 400, "MALFORMED_JSON"),
    ("bad UTF-8", b'{"workflowId": "\xff", "input": {}}', 400, "MALFORMED_JSON"),
    (
        "lone surrogate",
        b'{"workflowId": "test-echo", "input": {"a": "\\ud800"}}',
        400,
        "MALFORMED_JSON",
    ),
    ("NaN", b'{"workflowId": "test-echo", "input": {"a": NaN}}', 400, "MALFORMED_JSON"),
    ("too deep", DEEP.encode(), 400, "MALFORMED_JSON"),
    ("far too deep", b"[" * 200_000, 400, "MALFORMED_JSON"),
]


@pytest.mark.parametrize(
    ("body", "status", "code"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
@pytest.mark.parametrize("route", ["/v1/execute", "/v1/execute/async", "/v1/execute/stream"])
def test_bad_input_is_refused_in_words(
    http: httpx.Client, route: str, body: bytes, status: int, code: str
) -> None:
    answer = http.post(route, content=body, headers={"X-Request-Id": "req-7"})
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["requestId"] == answer.headers["x-request-id"] == "req-7"
    assert len(problem["detail"]) > 5
    if status == 422:
        assert all(item["loc"] and item["msg"] for item in problem["errors"])


def test_a_body_over_the_limit_is_refused_early(http: httpx.Client) -> None:
    answer = http.post("/v1/execute", content=b" " * (10 * 1024 * 1024 + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "BODY_TOO_LARGE")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Authorization": "Bearer wrong-key-0123456789"}, 401, "UNAUTHORIZED"),
        ({"X-API-Key": "wrong-key-0123456789"}, 401, "UNAUTHORIZED"),
        ({"Origin": "http://evil.example"}, 401, "UNAUTHORIZED"),
        ({"Host": "evil.example"}, 401, "UNAUTHORIZED"),
        ({"X-API-Key": API_KEY, "X-Workspace-Id": "another"}, 403, "FORBIDDEN"),
        ({"X-API-Key": API_KEY, "X-Workspace-Id": "default"}, 200, None),
        ({}, 200, None),  # local development: loopback, no foreign origin
    ],
)
def test_keys(service: Service, headers: dict[str, str], status: int, code: str | None) -> None:
    answer = httpx.post(f"{service.url}/v1/execute", json=ECHO, headers=headers)
    assert answer.status_code == status
    assert answer.json().get("code") == code
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 40, "%00"])
def test_a_cursor_that_is_none_is_refused(http: httpx.Client, cursor: str) -> None:
    execution_id = http.post("/v1/execute", json=ECHO).json()["id"]
    answer = http.get(f"/v1/executions/{execution_id}/stream?after={cursor}")
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_CURSOR")


@pytest.mark.parametrize(
    "execution_id", ["exe_00nothere", "nonsense", "exe_ff", "exe_zz", "%2e%2e"]
)
@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("GET", "/stream"), ("POST", "/cancel")])
def test_unknown_ids_are_404(http: httpx.Client, execution_id: str, method: str, tail: str) -> None:
    answer = http.request(method, f"/v1/executions/{execution_id}{tail}")
    assert answer.status_code == 404
    assert answer.json()["code"] in {"UNKNOWN_EXECUTION", "NOT_FOUND"}


def test_health_names_every_service(http: httpx.Client) -> None:
    health = httpx.get(f"{http.base_url}/v1/health").json()
    assert health["status"] == "healthy"
    assert set(health["services"]) == {"redis", "workflow_engine", "models"}
    assert health["services"]["models"]["models"] == ["SmolLM2-135M-Instruct"]


def test_framework_errors_are_problems_too(http: httpx.Client) -> None:
    assert http.get("/nowhere").json()["code"] == "NOT_FOUND"
    assert http.get("/v1/execute").json()["code"] == "METHOD_NOT_ALLOWED"
    assert http.get("/openapi.json").json()["paths"].keys() >= {"/v1/execute", "/v1/health"}

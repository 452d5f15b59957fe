"""Both clients over a scripted server: every test runs against the sync and the async one."""

import json
from typing import Any

import httpx
import pytest

from inferpipe import (
    ApiStatusError,
    AsyncInferPipe,
    ExecutionFailedError,
    HttpOptions,
    InferPipe,
    InferPipeConnectionError,
    InferPipeProtocolError,
    InferPipeTimeoutError,
    InvalidArgumentError,
    OverloadedError,
    RateLimitedError,
    RetryConfig,
    errors,
)
from tests.support.sdk_server import RESULT, Ask, Outcome, Server, asker, ok, problem

DOWN = httpx.ConnectError("refused")


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return asker(request.param)


def test_execute_sends_the_contracts_request(ask: Ask) -> None:
    server = Server([ok()])
    result = ask(
        server, "execute", "test-echo", {"message": "hi", "at": None},
        timeout_ms=120000, retry_config={"attempts": 3, "max_delay": 30000},
        metadata={"k": "ä"}, user_id="u1", priority=5, cache_ttl_s=60,
        config={"api_key": "k" * 16, "workspace_id": "w1", "base_url": "http://api.test/base"},
    )  # fmt: skip
    assert result.data == {"message": "hi"}
    (request,) = server.requests
    assert (request.method, str(request.url)) == ("POST", "http://api.test/base/v1/execute")
    assert json.loads(request.content) == {
        "workflowId": "test-echo", "input": {"message": "hi", "at": None}, "timeout": 120000,
        "retryConfig": {"attempts": 3, "maxDelay": 30000}, "metadata": {"k": "ä"},
        "userId": "u1", "priority": 5, "cache": {"ttl": 60},
    }  # fmt: skip
    assert request.headers["authorization"] == "Bearer " + "k" * 16
    assert request.headers["x-workspace-id"] == "w1"
    assert request.headers["idempotency-key"]
    assert request.extensions["timeout"]["read"] == 125.0


def test_execute_leaves_out_what_is_not_given(ask: Ask) -> None:
    server = Server([ok()])
    ask(server, "execute", "test-echo", {}, timeout_ms=None)
    (request,) = server.requests
    assert json.loads(request.content) == {"workflowId": "test-echo", "input": {}}
    assert not {"authorization", "x-workspace-id"} & request.headers.keys()
    assert request.extensions["timeout"] == {
        "connect": 10.0,
        "read": 60.0,
        "write": 60.0,
        "pool": 60.0,
    }


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_execute_raises_unless_completed(ask: Ask, status: str) -> None:
    server = Server([ok({**RESULT, "status": status, "error": "it broke", "errorCode": "TIMEOUT"})])
    with pytest.raises(ExecutionFailedError, match=f"execution e1 {status}: it broke") as caught:
        ask(server, "execute", "test-echo", {})
    assert caught.value.result.error_code == "TIMEOUT"


def test_execute_async_returns_the_id(ask: Ask) -> None:
    server = Server([ok({"id": "e1", "status": "pending"}, 202)])
    info = ask(server, "execute_async", "w", {}, retry_config=RetryConfig(attempts=0))
    assert (info.id, info.status) == ("e1", "pending")
    assert server.requests[0].url.path == "/v1/execute/async"
    assert json.loads(server.requests[0].content)["retryConfig"] == {"attempts": 0}


def test_get_execution_reads_the_record(ask: Ask) -> None:
    step = {"id": "s", "type": "echo", "status": "completed", "output": 1}
    server = Server([ok({**RESULT, "createdAt": "2026-11-21T05:24:00Z", "steps": [step]})])
    record = ask(server, "get_execution", "a/b?c")
    assert record.steps[0].output == 1
    assert server.requests[0].url.raw_path == b"/v1/executions/a%2Fb%3Fc"


def test_cancel_execution_posts(ask: Ask) -> None:
    server = Server([ok({"id": "e1", "status": "cancelling"}, 202)])
    assert ask(server, "cancel_execution", "e1") is None
    assert (server.requests[0].method, server.requests[0].url.path) == (
        "POST", "/v1/executions/e1/cancel"
    )  # fmt: skip


@pytest.mark.parametrize("status", [200, 503])
def test_health_returns_any_health(ask: Ask, status: int) -> None:
    server = Server(
        [ok({"status": "degraded", "version": "1", "services": {"redis": "down"}}, status)]
    )
    health = ask(server, "health")
    assert (health.status, health.services) == ("degraded", {"redis": "down"})
    assert len(server.requests) == 1


def test_health_of_a_proxy_raises(ask: Ask) -> None:
    with pytest.raises(OverloadedError, match="503 SERVICE_UNAVAILABLE: no backend"):
        ask(Server([httpx.Response(503, text="no\nbackend")]), "health")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "MALFORMED_JSON", errors.BadRequestError),
        (401, "UNAUTHORIZED", errors.AuthenticationError),
        (403, "FORBIDDEN", errors.PermissionDeniedError),
        (404, "UNKNOWN_WORKFLOW", errors.NotFoundError),
        (409, "IDEMPOTENCY_CONFLICT", errors.ConflictError),
        (422, "INVALID_INPUT", errors.UnprocessableError),
        (429, "RATE_LIMIT_EXCEEDED", errors.RateLimitedError),
        (503, "OVERLOADED", errors.OverloadedError),
        (413, "BODY_TOO_LARGE", ApiStatusError),
        (500, "INTERNAL", ApiStatusError),
        (599, "ODD", ApiStatusError),
    ],
)
def test_refusal_becomes_its_error(
    ask: Ask, status: int, code: str, kind: type[ApiStatusError]
) -> None:
    server = Server([problem(status, code, errors=[{"loc": ["input", 0], "msg": "no"}])])
    with pytest.raises(ApiStatusError) as caught:
        ask(server, "execute", "w", {}, config={"retries": 0})
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.detail, error.request_id) == (status, code, "D", "r1")
    assert str(error) == f"{status} {code}: D; input.0: no (request r1)"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (httpx.Response(502, text="<h1>Bad\nGate</h1>"), "502 BAD_GATEWAY: <h1>Bad Gate</h1>"),
        (httpx.Response(301, headers={"location": "https://x/"}), "301 .* redirected to https://x/"),
        (httpx.Response(520, content=b"\xff" * 9000), "520 HTTP_520: \ufffd{200}$"),
        (httpx.Response(404, text="{}", headers={"x-request-id": "q"}), "request q"),
    ],
)  # fmt: skip
def test_foreign_error_body_is_quoted(ask: Ask, answer: httpx.Response, text: str) -> None:
    with pytest.raises(ApiStatusError, match=text):
        ask(Server([answer]), "get_execution", "e1")


@pytest.mark.parametrize("content", [b"<html>", b"{}", b"[]", b"", b"\xff"])
def test_unreadable_success_is_a_protocol_error(ask: Ask, content: bytes) -> None:
    with pytest.raises(InferPipeProtocolError, match="is base_url an inferpipe server"):
        ask(Server([httpx.Response(200, content=content)]), "execute", "w", {})


@pytest.mark.parametrize(
    ("outcomes", "slept"),
    [
        ([DOWN, ok()], [0.25]),
        ([DOWN, httpx.RemoteProtocolError("cut"), ok()], [0.25, 0.5]),
        ([problem(503, "OVERLOADED"), ok()], [0.25]),
        ([problem(429, "RATE_LIMIT_EXCEEDED", headers={"retry-after": "7"}), ok()], [7.25]),
        ([problem(503, "OVERLOADED", headers={"retry-after": "60"}), ok()], [60.25]),
        (
            [
                problem(503, "OVERLOADED", headers={
                    "retry-after": "Sat, 21 Nov 2026 05:24:03 GMT",
                    "date": "Sat, 21 Nov 2026 05:24:00 GMT"}),
                ok(),
            ],
            [3.25],
        ),
        ([problem(503, "OVERLOADED", headers={"retry-after": "soon"}), ok()], [0.25]),
    ],
)  # fmt: skip
def test_passing_failure_is_retried_with_one_key(
    ask: Ask, outcomes: list[Outcome], slept: list[float]
) -> None:
    server = Server(outcomes)
    assert ask(server, "execute", "w", {}).id == "e1"
    assert server.slept == slept
    keys = {request.headers["idempotency-key"] for request in server.requests}
    assert (len(keys), len(server.requests)) == (1, len(outcomes))


@pytest.mark.parametrize(
    ("outcome", "kind", "tries"),
    [
        (DOWN, InferPipeConnectionError, 3),
        (httpx.ConnectTimeout("slow"), InferPipeConnectionError, 3),
        (httpx.ReadTimeout("silent"), InferPipeTimeoutError, 1),
        (problem(503, "OVERLOADED"), OverloadedError, 3),
        (problem(429, "RATE_LIMIT_EXCEEDED"), RateLimitedError, 3),
        (problem(429, "RATE_LIMIT_EXCEEDED", headers={"retry-after": "61"}), RateLimitedError, 1),
        (problem(500, "INTERNAL"), ApiStatusError, 1),
        (problem(404, "UNKNOWN_WORKFLOW"), errors.NotFoundError, 1),
    ],
)
@pytest.mark.parametrize("method", ["execute", "get_execution"])
def test_retries_end(
    ask: Ask, method: str, outcome: Outcome, kind: type[Exception], tries: int
) -> None:
    server = Server([outcome])
    with pytest.raises(kind) as caught:
        ask(server, method, *(["w", {}] if method == "execute" else ["e1"]))
    assert type(caught.value) is kind
    assert len(server.requests) == tries


def test_two_calls_have_two_keys_and_a_given_key_is_kept(ask: Ask) -> None:
    server = Server([ok()])
    for options in ({}, {}, {"idempotency_key": "mine"}):
        ask(server, "execute", "w", {}, **options)
    first, second, third = (request.headers["idempotency-key"] for request in server.requests)
    assert first != second
    assert third == "mine"


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        (("", {}), {}, "workflowId"),
        (("w", [1]), {}, "input"),
        (("w", {"x": float("nan")}), {}, "not JSON"),
        (("w", {"x": "\ud800"}), {}, "not JSON"),
        (("w", {"x": object()}), {}, "not JSON"),
        (("w", {}), {"timeout_ms": 0}, "timeout: Input should be greater than 0"),
        (("w", {}), {"timeout_ms": 1.5}, "timeout"),
        (("w", {}), {"retry_config": {"attempts": -1}}, "retryConfig.attempts"),
        (("w", {}), {"priority": 101}, "priority"),
        (("w", {}), {"metadata": [1]}, "metadata"),
    ],
)
@pytest.mark.parametrize("method", ["execute", "execute_async"])
def test_wrong_argument_is_refused_before_sending(
    ask: Ask, method: str, args: tuple[Any, ...], options: dict[str, Any], text: str
) -> None:
    server = Server([ok()])
    with pytest.raises(InvalidArgumentError, match=text):
        ask(server, method, *args, **options)
    assert not server.requests


def test_cyclic_input_is_refused(ask: Ask) -> None:
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        ask(Server([ok()]), "execute", "w", cycle)


def test_unknown_option_is_a_type_error(ask: Ask) -> None:
    with pytest.raises(TypeError, match="timeout_s"):
        ask(Server([ok()]), "execute", "w", {}, timeout_s=1)


@pytest.mark.parametrize("execution_id", ["", ".", ".."])
def test_id_that_would_reach_another_route_is_refused(ask: Ask, execution_id: str) -> None:
    with pytest.raises(InvalidArgumentError):
        ask(Server([ok()]), "get_execution", execution_id)


@pytest.mark.parametrize(
    "config",
    [
        {"base_url": "api.test"}, {"base_url": "ftp://api.test"}, {"base_url": "http://"},
        {"api_key": "a\nb"}, {"api_key": ""}, {"api_key": "ä"}, {"workspace_id": ""},
        {"timeout": 0}, {"retries": -1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("client", [InferPipe, AsyncInferPipe])
def test_wrong_setting_is_refused(client: type[Any], config: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(config))):
        client(**config)


def test_from_env_reads_the_environment_below_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([ok()])
    monkeypatch.setenv("INFERPIPE_API_KEY", "k" * 16)
    monkeypatch.setenv("INFERPIPE_WORKSPACE_ID", "")
    monkeypatch.setenv("INFERPIPE_BASE_URL", "http://from.env")
    for options in ({}, {"base_url": "http://given"}):
        with InferPipe.from_env(transport=httpx.MockTransport(server), **options) as client:  # type: ignore[arg-type]
            client.execute("w", {})
    assert [request.url.host for request in server.requests] == ["from.env", "given"]
    assert server.requests[0].headers["authorization"] == "Bearer " + "k" * 16
    assert "x-workspace-id" not in server.requests[0].headers


def test_key_does_not_show() -> None:
    client = InferPipe("secret-key-0123456", http_options=HttpOptions(connections_max=1))
    assert "secret" not in repr(client) + repr(vars(client)) + repr(client._runner._config)
    client.close()

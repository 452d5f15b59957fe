"""Every call beside executing: what is sent, what comes back, over both clients."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from inferpipe import (
    AsyncInferPipe,
    ConflictError,
    ExecutionFailedError,
    HttpOptions,
    InferPipe,
    InferPipeProtocolError,
    InferPipeTimeoutError,
    InvalidArgumentError,
    NotFoundError,
    _http,
)
from inferpipe._config import ClientConfig
from inferpipe.wire import encode_sse
from tests.support.sdk_server import RESULT, Ask, Server, asker, ok, problem

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
AT = "2026-11-21T12:00:00Z"
NOON_QUERY = "2026-11-21T12%3A00%3A00%2B00%3A00"
RECORD = {**RESULT, "createdAt": AT}
INFO = {"id": "e2", "status": "pending", "retryOf": "e1"}
WORKFLOW = {"id": "w", "version": 3, "createdAt": AT, "steps": []}
KEY = {"id": "k", "name": "n", "prefix": "ip_", "scopes": ["read"], "createdAt": AT, "key": "s"}
WEBHOOK = {"id": "h", "url": "https://x", "events": ["*"], "secret": "whsec_1"}
DELIVERY = {
    "id": "d", "webhookId": "h", "eventId": "evt_1", "status": "failed", "nextAttemptAt": AT,
    "attempts": [{"at": AT, "status": 500, "latencyMs": 3, "error": None}],
}  # fmt: skip
HOST = {
    "id": "h1", "apiUrl": "ws://x/hosts/h1", "models": ["m"], "region": "", "stake": "0",
    "status": "ready", "latencyMs": None, "load": 0, "queuedTokens": 0, "kvUsage": 0.0,
}  # fmt: skip
SESSION = {
    "id": "s1", "model": "m", "system": None, "messageCount": 0, "createdAt": AT,
    "lastUsedAt": AT, "expiresAt": AT,
}  # fmt: skip
SAID = {"role": "user", "content": "hi", "createdAt": AT}
YAML = "steps: [{id: echo, echo: {}}]"


def page(*items: object, cursor: str | None = None) -> httpx.Response:
    return ok({"items": items, "nextCursor": cursor})


NOTHING = httpx.Response(204)
ACCEPTED = ok({}, 202)
Case = tuple[str, tuple[Any, ...], dict[str, Any], httpx.Response, str, object]
CALLS: list[Case] = [
    ("executions.get", ("e1",), {}, ok(RECORD), "GET /v1/executions/e1", None),
    ("executions.list", (), {}, page(RECORD), "GET /v1/executions", None),
    (
        "executions.list", (), {"workflow_id": "a b", "status": "failed", "page_size": 7},
        page(RECORD), "GET /v1/executions?workflowId=a+b&status=failed&limit=7", None,
    ),
    ("executions.cancel", ("e1",), {}, ACCEPTED, "POST /v1/executions/e1/cancel", None),
    ("executions.retry", ("e1",), {}, ok(INFO, 202), "POST /v1/executions/e1/retry", None),
    (
        "executions.retry", ("e1",), {"from_step": "s/1"}, ok(INFO, 202),
        "POST /v1/executions/e1/retry?fromStep=s%2F1", None,
    ),
    (
        "executions.signal", ("e1", "approve", {"by": "ä"}), {}, ACCEPTED,
        "POST /v1/executions/e1/signal", {"name": "approve", "data": {"by": "ä"}},
    ),
    (
        "executions.signal", ("e1", "go"), {}, ACCEPTED,
        "POST /v1/executions/e1/signal", {"name": "go", "data": None},
    ),
    ("workflows.put", ("w", {"steps": []}), {}, ok(WORKFLOW, 201), "PUT /v1/workflows/w",
     {"steps": []}),
    ("workflows.put", ("w", YAML), {}, ok(WORKFLOW), "PUT /v1/workflows/w", YAML),
    ("workflows.get", ("w",), {}, ok(WORKFLOW), "GET /v1/workflows/w", None),
    ("workflows.get", ("w",), {"version": 2}, ok(WORKFLOW), "GET /v1/workflows/w?version=2", None),
    ("workflows.list", (), {}, page(WORKFLOW), "GET /v1/workflows", None),
    ("workflows.versions", ("w",), {}, page(WORKFLOW), "GET /v1/workflows/w/versions", None),
    ("workflows.delete", ("w",), {}, NOTHING, "DELETE /v1/workflows/w", None),
    (
        "workflows.validate", ("w", {}), {},
        ok({"valid": False, "errors": [{"loc": ["steps"], "msg": "missing"}]}),
        "POST /v1/workflows/w/validate", {},
    ),
    (
        "keys.create", ("n", ["read"]), {"expires_at": NOON}, ok(KEY, 201), "POST /v1/keys",
        {"name": "n", "scopes": ["read"], "expiresAt": AT},
    ),
    (
        "keys.create", ("n", ["read"]), {"rate_limit": {"requests": 9, "window": "60s"}},
        ok(KEY, 201), "POST /v1/keys",
        {"name": "n", "scopes": ["read"], "rateLimit": {"requests": 9, "window": "60s"}},
    ),
    ("keys.list", (), {}, page(KEY), "GET /v1/keys", None),
    ("keys.revoke", ("k/1",), {}, NOTHING, "DELETE /v1/keys/k%2F1", None),
    ("workspaces.create", ("acme",), {}, ok({"id": "acme"}, 201), "POST /v1/workspaces",
     {"id": "acme"}),
    ("workspaces.list", (), {}, page({"id": "acme"}), "GET /v1/workspaces", None),
    (
        "webhooks.create", ("https://x", ["*"]), {"workflow_id": "w", "enabled": False},
        ok(WEBHOOK, 201), "POST /v1/webhooks",
        {"url": "https://x", "events": ["*"], "workflowId": "w", "enabled": False},
    ),
    ("webhooks.get", ("h",), {}, ok(WEBHOOK), "GET /v1/webhooks/h", None),
    ("webhooks.list", (), {}, page(WEBHOOK), "GET /v1/webhooks", None),
    (
        "webhooks.update", ("h", {"workflow_id": None, "enabled": True}), {}, ok(WEBHOOK),
        "PATCH /v1/webhooks/h", {"workflowId": None, "enabled": True},
    ),
    ("webhooks.delete", ("h",), {}, NOTHING, "DELETE /v1/webhooks/h", None),
    ("webhooks.test", ("h",), {}, ok(DELIVERY, 202), "POST /v1/webhooks/h/test", None),
    (
        "webhooks.rotate_secret", ("h",), {"overlap_ms": 5}, ok({"secret": "whsec_2"}),
        "POST /v1/webhooks/h/rotate-secret", {"overlap": 5},
    ),
    ("webhooks.deliveries", ("h",), {}, page(DELIVERY), "GET /v1/webhooks/h/deliveries", None),
    (
        "webhooks.deliveries", ("h",), {"status": "dead"}, page(DELIVERY),
        "GET /v1/webhooks/h/deliveries?status=dead", None,
    ),
    ("webhooks.delivery", ("d",), {}, ok(DELIVERY), "GET /v1/deliveries/d", None),
    (
        "webhooks.replay", ("h",), {"status": "dead", "from_": NOON},
        ok({"replayed": 2, "isComplete": True}, 202),
        "POST /v1/webhooks/h/replay", {"status": "dead", "from": AT},
    ),
    (
        "webhooks.replay_delivery", ("d",), {}, ok(DELIVERY, 202),
        "POST /v1/deliveries/d/replay", None,
    ),
    (
        "stream_tokens.create", ("/stream/user/u1",), {"ttl_s": 60},
        ok({"token": "t", "expiresAt": AT}, 201), "POST /v1/stream-tokens",
        {"resource": "/stream/user/u1", "ttl": 60},
    ),
    ("hosts.list", (), {}, ok({"hosts": [HOST]}), "GET /v1/hosts", None),
    (
        "hosts.select", ("m",), {"min_stake": "1.5", "max_latency": 200, "region": "eu"}, ok(HOST),
        "POST /v1/hosts/select",
        {"model": "m", "minStake": "1.5", "maxLatency": 200, "region": "eu"},
    ),
    ("sessions.create", ("m",), {"system": "s"}, ok(SESSION, 201), "POST /v1/sessions",
     {"model": "m", "system": "s"}),
    ("sessions.get", ("s/1",), {}, ok(SESSION), "GET /v1/sessions/s%2F1", None),
    ("sessions.messages", ("s1",), {}, page(SAID), "GET /v1/sessions/s1/messages", None),
    ("sessions.end", ("s1",), {}, NOTHING, "DELETE /v1/sessions/s1", None),
    (
        "usage", (), {"from_": NOON, "group_by": "day"},
        ok({"items": [{"day": "2026-11-21", "promptTokens": 1}], "totals": {"promptTokens": 1}}),
        f"GET /v1/usage?from={NOON_QUERY}&groupBy=day", None,
    ),
    ("health", (), {}, ok({"status": "healthy", "version": "1"}), "GET /v1/health", None),
]  # fmt: skip


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return asker(request.param)


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case[4])
def test_call_is_the_contracts(ask: Ask, case: Case) -> None:
    method, args, kwargs, answer, line, body = case
    server = Server([answer])
    ask(server, method, *args, **kwargs)
    (request,) = server.requests
    assert f"{request.method} {request.url.raw_path.decode()}" == line
    if isinstance(body, str):
        assert request.headers["content-type"] == "application/yaml"
        assert request.content.decode() == body
    elif body is not None:
        assert request.headers["content-type"] == "application/json"
        assert json.loads(request.content) == body
    else:
        assert request.content == b""
    assert ("idempotency-key" in request.headers) == (request.method == "POST")


def test_every_method_of_a_resource_is_in_the_table() -> None:
    with InferPipe() as client:
        methods = {
            f"{name}.{method}"
            for name, resource in vars(client).items()
            if type(resource).__module__ == "inferpipe.resources"
            for method in dir(resource)
            if not method.startswith("_")
        }
    assert methods - {"executions.follow"} <= {method for method, *_ in CALLS}


def test_answers_are_typed(ask: Ask) -> None:
    assert ask(Server([ok(INFO, 202)]), "executions.retry", "e1").retry_of == "e1"
    assert ask(Server([ok(WEBHOOK)]), "webhooks.get", "h").secret == "whsec_1"
    (delivery,) = ask(Server([page(DELIVERY)]), "webhooks.deliveries", "h")
    assert delivery.attempts[0].latency_ms == 3
    assert delivery.next_attempt_at == NOON
    verdict = ask(Server([ok({"valid": False, "errors": [{"loc": ["a", 0], "msg": "m"}]})]),
                  "workflows.validate", "w", {})  # fmt: skip
    assert verdict.errors[0].loc == ["a", 0]
    item = {"workflowId": "w", "totalTokens": 3}
    (used,) = ask(Server([ok({"items": [item], "totals": {}})]), "usage").items
    assert (used.total_tokens, used.model_extra) == (3, {"workflowId": "w"})


def test_list_walks_all_pages_as_it_is_read(ask: Ask) -> None:
    pages = [page({**RECORD, "id": f"e{at}"}, cursor=f"{at}.x") for at in range(3)]
    server = Server([*pages, page({**RECORD, "id": "e3"})])
    assert [one.id for one in ask(server, "executions.list")] == ["e0", "e1", "e2", "e3"]
    assert [request.url.params.get("cursor") for request in server.requests] == [
        None, "0.x", "1.x", "2.x"
    ]  # fmt: skip


def test_list_that_is_left_asks_for_no_further_page() -> None:
    server = Server([page(RECORD, RECORD, cursor="1.x")])
    with InferPipe(transport=httpx.MockTransport(server)) as client:
        for _ in client.executions.list():
            break
    assert len(server.requests) == 1


def test_page_that_leads_to_itself_is_a_protocol_error(ask: Ask) -> None:
    server = Server([page(RECORD, cursor="1.x")])
    with pytest.raises(InferPipeProtocolError, match="names itself"):
        ask(server, "executions.list")
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("method", "args", "kwargs"),
    [
        ("workflows.get", ("..",), {}),
        ("keys.revoke", ("",), {}),
        ("keys.create", ("n", ["root"]), {}),
        ("keys.create", ("n", []), {}),
        ("keys.create", ("n", ["read"]), {"expires_at": datetime(2026, 1, 1)}),  # noqa: DTZ001
        ("executions.signal", ("e1", ""), {}),
        ("executions.signal", ("e1", "n", float("nan")), {}),
        ("webhooks.create", ("https://x", ["*"]), {"evnts": 1}),
        ("webhooks.update", ("h", {"colour": "red"}), {}),
        ("workflows.put", ("w", {"steps": object()}), {}),
        ("stream_tokens.create", ("stream/u",), {}),
        ("usage", (), {"from_": datetime(2026, 1, 1)}),  # noqa: DTZ001
    ],
)
def test_wrong_argument_is_refused_before_sending(
    ask: Ask, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    server = Server([ok({})])
    with pytest.raises(InvalidArgumentError):
        ask(server, method, *args, **kwargs)
    assert not server.requests


DOWN = httpx.RemoteProtocolError("cut")


def test_delete_whose_answer_was_lost_is_done_when_nothing_is_left(ask: Ask) -> None:
    server = Server([DOWN, problem(404, "UNKNOWN_KEY")])
    assert ask(server, "keys.revoke", "k") is None
    assert len(server.requests) == 2


@pytest.mark.parametrize("first", [[], [problem(503, "OVERLOADED")]])
def test_delete_of_what_never_was_raises(ask: Ask, first: list[httpx.Response]) -> None:
    with pytest.raises(NotFoundError):
        ask(Server([*first, problem(404, "UNKNOWN_KEY")]), "keys.revoke", "k")


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("workflows.put", ("w", {})),
        ("executions.signal", ("e1", "s")),
        ("keys.create", ("n", ["read"])),
    ],
)
def test_repeat_after_a_lost_answer_is_the_same_request(
    ask: Ask, method: str, args: tuple[Any, ...]
) -> None:
    server = Server([DOWN, ok({**WORKFLOW, **KEY})])
    ask(server, method, *args)
    first, second = server.requests
    assert (first.content, first.headers) == (second.content, second.headers)


def stream_body(*events: tuple[int, str, dict[str, Any]]) -> httpx.Response:
    content = b"".join(
        encode_sse(name, json.dumps({"executionId": "e1", **data}).encode(), seq)
        for seq, name, data in events
    )
    headers = {"content-type": "text/event-stream", "x-execution-id": "e1"}
    return httpx.Response(200, headers=headers, content=content)


CHUNK = (3, "chunk", {"data": "x", "step": "s"})
END = (4, "execution.completed", RESULT)


def follow(server: Server, kind: str, **options: Any) -> tuple[list[int | None], Any]:
    if kind == "sync":
        with InferPipe(transport=httpx.MockTransport(server), sleep=lambda _: None) as client:
            stream = client.executions.follow("e1", **options)
            return [event.id for event in stream.events()], stream.result

    async def run() -> tuple[list[int | None], Any]:
        transport = httpx.MockTransport(server)
        async with AsyncInferPipe(transport=transport, sleep=server.async_sleep) as client:
            stream = client.executions.follow("e1", **options)
            return [event.id async for event in stream.events()], stream.result

    return asyncio.run(run())


kinds = pytest.mark.parametrize("kind", ["sync", "async"])


@kinds
def test_follow_joins_at_the_cursor_and_goes_on_after_a_cut(kind: str) -> None:
    server = Server([stream_body(CHUNK), stream_body(END)])
    ids, result = follow(server, kind, after=2)
    assert (ids, result.id) == ([3, 4], "e1")
    assert [request.headers["last-event-id"] for request in server.requests] == ["2", "3"]
    assert {request.method for request in server.requests} == {"GET"}
    assert "idempotency-key" not in server.requests[0].headers


@kinds
def test_follow_beyond_the_end_gives_the_result_alone(kind: str) -> None:
    server = Server([httpx.Response(204), ok(RECORD)])
    ids, result = follow(server, kind, after=4)
    assert (ids, result.id) == ([None], "e1")


@kinds
def test_follow_of_an_unknown_execution_raises(kind: str) -> None:
    with pytest.raises(NotFoundError):
        follow(Server([problem(404, "UNKNOWN_EXECUTION")]), kind)


def test_wait_returns_the_result_or_raises() -> None:
    server = Server([stream_body(CHUNK, END)])
    with InferPipe(transport=httpx.MockTransport(server)) as client:
        assert client.executions.follow("e1").wait().id == "e1"
    failed = (4, "execution.failed", {**RESULT, "status": "failed"})
    server = Server([stream_body(CHUNK, failed)])
    with (
        InferPipe(transport=httpx.MockTransport(server)) as client,
        pytest.raises(ExecutionFailedError),
    ):
        client.executions.follow("e1").wait()


def test_conflict_keeps_its_code(ask: Ask) -> None:
    with pytest.raises(ConflictError) as caught:
        ask(Server([problem(409, "NOT_TERMINAL")]), "executions.retry", "e1")
    assert caught.value.code == "NOT_TERMINAL"


class Slow(httpx.SyncByteStream, httpx.AsyncByteStream):
    """White space now and then, as the server writes while it works, and never an answer."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def __iter__(self) -> Any:
        for _ in range(1000):
            self.clock[0] += 0.5
            yield b" "

    async def __aiter__(self) -> Any:
        for piece in self:
            yield piece


@pytest.mark.parametrize(("options", "waited_s"), [({}, 60), ({"timeout_ms": 100_000}, 105)])
def test_an_answer_that_only_begins_is_a_time_out(
    monkeypatch: pytest.MonkeyPatch, ask: Ask, options: dict[str, Any], waited_s: float
) -> None:
    clock = [0.0]
    monkeypatch.setattr(_http, "monotonic_s", lambda: clock[0])

    class Silent(Server):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            return httpx.Response(200, stream=Slow(clock))

    server = Silent([])
    with pytest.raises(InferPipeTimeoutError):
        ask(server, "execute", "w", {}, **options)
    assert len(server.requests) == 1
    assert clock[0] == waited_s + 0.5


def test_own_http_client_is_used_and_left_open() -> None:
    server = Server([ok()])
    with httpx.Client(
        transport=httpx.MockTransport(server), headers={"x-trace": "1"}, base_url="http://other"
    ) as own:
        with InferPipe("k" * 16, base_url="http://api.test/base/", http_client=own) as client:
            client.execute("w", {})
        assert not own.is_closed
    (request,) = server.requests
    assert str(request.url) == "http://api.test/base/v1/execute"
    assert request.headers["x-trace"] == "1"
    assert request.headers["authorization"] == "Bearer " + "k" * 16


def test_own_http_client_excludes_options() -> None:
    with httpx.Client() as own, pytest.raises(InvalidArgumentError, match="http_client"):
        InferPipe(http_client=own, http_options=HttpOptions())


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:1")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.test:1")
    with InferPipe() as client:
        assert client._http._mounts == {}
    with InferPipe(http_options=HttpOptions(proxy="http://mine.test:1")) as client:
        assert len(client._http._mounts) == 1


def test_options_reach_the_pool() -> None:
    options = HttpOptions(connections_max=3, keepalive=False)
    with InferPipe(http_options=options) as client:
        pool: Any = client._http._transport
        assert (pool._pool._max_connections, pool._pool._max_keepalive_connections) == (3, 0)


STAGING = {
    "INFERPIPE_API_KEY": "k" * 16,
    "INFERPIPE_BASE_URL": "http://plain",
    "INFERPIPE_RETRIES": "5",
    "INFERPIPE_STAGING_BASE_URL": "http://staging",
    "INFERPIPE_STAGING_TIMEOUT_S": "120",
    "INFERPIPE_STAGING_WORKSPACE_ID": "",
}


@pytest.mark.parametrize("client", [InferPipe, AsyncInferPipe])
@pytest.mark.parametrize("named", ["argument", "variable"])
def test_an_environment_has_its_own_variables_above_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, client: Any, named: str
) -> None:
    for name, value in STAGING.items():
        monkeypatch.setenv(name, value)
    if named == "variable":
        monkeypatch.setenv("INFERPIPE_ENVIRONMENT", "staging")
    opened = client.from_env("staging" if named == "argument" else None)
    config: ClientConfig = opened._runner._config
    assert (config.base_url, config.timeout, config.retries) == ("http://staging", 120.0, 5)
    assert (config.api_key, config.workspace_id) == ("k" * 16, None)


@pytest.mark.parametrize(
    ("variables", "environment", "text"),
    [
        ({}, "stagign", "no variable INFERPIPE_STAGIGN_"),
        ({"INFERPIPE_ENVIRONMENT": "prod"}, None, "no variable INFERPIPE_PROD_"),
        ({}, "../x", "not the name"),
        ({"INFERPIPE_TIMEOUT_S": "fast"}, None, "INFERPIPE_TIMEOUT_S is no number"),
        ({"INFERPIPE_RETRIES": "1.5"}, None, "INFERPIPE_RETRIES is no number"),
        ({"INFERPIPE_TIMEOUT_S": "nan"}, None, "timeout must be above 0"),
    ],
)
def test_a_slip_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    environment: str | None,
    text: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgumentError, match=text):
        InferPipe.from_env(environment)

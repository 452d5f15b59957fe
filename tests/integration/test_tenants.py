"""The border between workspaces and the scopes of keys, on every route there is.

Routes are taken from the application, so a new one is walked too: it fails here until it is known
which ids it takes and which scope it needs.
"""

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute

from serve_app.core.auth import Scope
from tests.support.api import ADMIN_KEY, Api, running_api
from tests.support.openapi import bare_app, openapi_document

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "known-to-the-first-tenant-alone"
CHAT = {"messages": [{"role": "user", "content": SECRET}]}
DOCUMENT = openapi_document()
# Whose call it is stands in the path, or a signature says it: test_events.py and test_hooks.py
# have their borders.
KEY_IN_PATH = ("/e/", "/hooks/")
ROUTES = sorted(
    (method, route.path)
    for route in bare_app().routes
    if isinstance(route, APIRoute) and route.include_in_schema
    if not route.path.startswith(KEY_IN_PATH)
    for method in route.methods
)
KEYLESS = {("GET", "/v1/health"), ("GET", "/metrics")}

# The least scope that does not get 403.
SCOPES = {
    ("DELETE", "/v1/keys/{key_id}"): Scope.ADMIN,
    ("DELETE", "/v1/sessions/{session_id}"): Scope.EXECUTE,
    ("DELETE", "/v1/workflows/{workflow_id}"): Scope.ADMIN,
    ("DELETE", "/v1/workflows/{workflow_id}/hook"): Scope.ADMIN,
    ("POST", "/v1/workflows/{workflow_id}/hook"): Scope.ADMIN,
    ("DELETE", "/v1/webhooks/{webhook_id}"): Scope.ADMIN,
    ("GET", "/v1/deliveries/{delivery_id}"): Scope.READ,
    ("GET", "/v1/models"): Scope.READ,
    ("GET", "/v1/models/{model_id:path}"): Scope.READ,
    ("GET", "/v1/webhooks"): Scope.READ,
    ("GET", "/v1/webhooks/{webhook_id}"): Scope.READ,
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"): Scope.READ,
    ("PATCH", "/v1/webhooks/{webhook_id}"): Scope.ADMIN,
    ("POST", "/v1/chat/completions"): Scope.EXECUTE,
    ("POST", "/v1/completions"): Scope.EXECUTE,
    ("POST", "/v1/deliveries/{delivery_id}/replay"): Scope.ADMIN,
    ("POST", "/v1/embeddings"): Scope.EXECUTE,
    ("POST", "/v1/responses"): Scope.EXECUTE,
    ("POST", "/v1/webhooks"): Scope.ADMIN,
    ("POST", "/v1/webhooks/{webhook_id}/replay"): Scope.ADMIN,
    ("POST", "/v1/webhooks/{webhook_id}/rotate-secret"): Scope.ADMIN,
    ("POST", "/v1/webhooks/{webhook_id}/test"): Scope.ADMIN,
    ("GET", "/v1/executions"): Scope.READ,
    ("GET", "/v1/executions/{execution_id}"): Scope.READ,
    ("GET", "/v1/executions/{execution_id}/stream"): Scope.READ,
    ("GET", "/v1/hosts"): Scope.READ,
    ("GET", "/v1/hosts/decisions"): Scope.ADMIN,
    ("GET", "/v1/keys"): Scope.ADMIN,
    ("GET", "/v1/sessions/{session_id}"): Scope.READ,
    ("GET", "/v1/sessions/{session_id}/messages"): Scope.READ,
    ("GET", "/v1/usage"): Scope.READ,
    ("GET", "/v1/workflows"): Scope.READ,
    ("GET", "/v1/workflows/{workflow_id}"): Scope.READ,
    ("GET", "/v1/workflows/{workflow_id}/versions"): Scope.READ,
    ("GET", "/v1/workspaces"): Scope.ADMIN,
    ("POST", "/v1/execute"): Scope.EXECUTE,
    ("POST", "/v1/execute/async"): Scope.EXECUTE,
    ("POST", "/v1/execute/stream"): Scope.EXECUTE,
    ("POST", "/v1/executions/{execution_id}/cancel"): Scope.EXECUTE,
    ("POST", "/v1/executions/{execution_id}/retry"): Scope.EXECUTE,
    ("POST", "/v1/executions/{execution_id}/signal"): Scope.EXECUTE,
    ("POST", "/v1/hosts/select"): Scope.READ,
    ("POST", "/v1/keys"): Scope.ADMIN,
    ("POST", "/v1/sessions"): Scope.EXECUTE,
    ("POST", "/v1/stream-tokens"): Scope.READ,
    ("POST", "/v1/workflows/{workflow_id}/validate"): Scope.READ,
    ("POST", "/v1/workspaces"): Scope.ADMIN,
    ("PUT", "/v1/workflows/{workflow_id}"): Scope.ADMIN,
}
# Routes where another tenant's id names something of one's own, and nothing is revealed.
OWN_NAMES = {
    ("PUT", "/v1/workflows/{workflow_id}"),
    ("POST", "/v1/workflows/{workflow_id}/validate"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    """One application for all tests here; each makes what it looks at."""
    async with running_api(valkey_url, tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(api: Api) -> dict[str, str]:
    """The headers of another workspace's admin."""
    return await api.new_workspace("second")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(api: Api) -> dict[Scope, dict[str, str]]:
    """Headers of the first workspace, by scope."""
    return {scope: await api.new_key(scope) for scope in Scope}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ids(api: Api) -> dict[str, str]:
    """What nobody but the first tenant may see, and what a delete by another must leave."""
    return await first_tenants_ids(api)


async def first_tenants_ids(api: Api) -> dict[str, str]:
    """One of everything that the first workspace can have, by the name of the path parameter."""
    chat = {"workflowId": "chat-assistant", "input": CHAT, "metadata": {"note": SECRET}}
    execution = await api.http.post("/v1/execute", json=chat)
    workflow_id = f"of-the-first-{api.services.entropy.token().lower().replace('_', '-')}"
    definition = {"description": SECRET, "steps": [{"id": "a", "echo": {}}]}
    defined = await api.http.put(f"/v1/workflows/{workflow_id}", json=definition)
    assert defined.status_code == 201, defined.text
    key = await api.http.post("/v1/keys", json={"name": SECRET, "scopes": ["read"]})
    session = await api.services.sessions.create("default", "m", SECRET)
    hook = {"url": "https://example.com/hook", "events": ["*"], "description": SECRET}
    webhook = await api.http.post("/v1/webhooks", json=hook)
    assert webhook.status_code == 201, webhook.text
    delivery = await api.http.post(f"/v1/webhooks/{webhook.json()['id']}/test")
    return {
        "webhook_id": webhook.json()["id"],
        "delivery_id": delivery.json()["id"],
        "model_id": "a-model-of-the-cluster",
        "execution_id": execution.json()["id"],
        "workflow_id": workflow_id,
        "key_id": key.json()["id"],
        "session_id": session.id,
    }


def a_body(method: str, path: str) -> dict[str, Any]:
    """The example of the document as arguments of a request."""
    operation = DOCUMENT["paths"][path.replace(":path}", "}")][method.lower()]
    content = operation.get("requestBody", {}).get("content", {})
    example = content.get("application/json", {}).get("example")
    return {} if example is None else {"json": example}


def code_of(answer: httpx.Response) -> str:
    """Our code, in our words or in OpenAI's."""
    body = answer.json()
    code = body["error"]["code"].upper() if "error" in body else body["code"]
    return str({"INVALID_API_KEY": "UNAUTHORIZED"}.get(code, code))


def filled(path: str, ids: dict[str, str]) -> str:
    names = re.findall(r"{(\w+)(?::\w+)?}", path)
    unknown = set(names) - ids.keys()
    assert not unknown, f"say in first_tenants_ids what makes a {unknown} of the first tenant's"
    return re.sub(r"{(\w+)(?::\w+)?}", lambda match: ids[match[1]], path)


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if "{" in route[1]])
async def test_another_workspaces_id_is_unknown(
    api: Api, ids: dict[str, str], other: dict[str, str], method: str, path: str
) -> None:
    url = filled(path, ids)
    answer = await api.http.request(method, url, headers=other, **a_body(method, path))
    assert SECRET not in answer.text
    if (method, path) in OWN_NAMES:
        assert answer.status_code in {200, 201}
        if method == "PUT":  # its own of that name, which it takes away again
            assert (await api.http.delete(url, headers=other)).status_code == 204
    else:
        assert answer.status_code == 404
        assert answer.headers["X-Request-Id"]
    await all_is_as_it_was(api, ids)


async def all_is_as_it_was(api: Api, ids: dict[str, str]) -> None:
    shown = [
        await api.http.get(f"/v1/executions/{ids['execution_id']}"),
        await api.http.get(f"/v1/workflows/{ids['workflow_id']}"),
        await api.http.get(f"/v1/sessions/{ids['session_id']}"),
        await api.http.get("/v1/keys"),
        await api.http.get(f"/v1/webhooks/{ids['webhook_id']}"),
    ]
    assert all(SECRET in answer.text for answer in shown)


@pytest.mark.parametrize(
    "path",
    [path for method, path in ROUTES if method == "GET" and "{" not in path],
)
async def test_a_list_shows_nothing_of_another_workspace(
    api: Api, ids: dict[str, str], other: dict[str, str], path: str
) -> None:
    answer = await api.http.get(path, headers=other)
    assert answer.status_code in {200, 403}
    assert SECRET not in answer.text
    assert not any(one in answer.text for one in ids.values())


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_each_route_asks_for_a_key_of_its_scope(
    api: Api, ids: dict[str, str], keys: dict[Scope, dict[str, str]], method: str, path: str
) -> None:
    if method == "DELETE":
        ids = await first_tenants_ids(api)  # the admin's own call will succeed
    url, body = filled(path, ids), a_body(method, path)

    async def call(headers: dict[str, str]) -> httpx.Response:
        request = api.http.build_request(method, url, headers=headers, **body)
        if "authorization" not in {name.lower() for name in headers}:
            del request.headers["Authorization"]  # the client's own
        return await api.http.send(request)

    if (method, path) in KEYLESS:
        assert (await call({})).status_code == 200
        return
    for nobody in ({}, {"X-API-Key": f"{ADMIN_KEY}x"}, {"Authorization": "Basic YTpi"}):
        refused = await call(nobody)
        assert (refused.status_code, code_of(refused)) == (401, "UNAUTHORIZED")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    elsewhere = await call({**keys[Scope.ADMIN], "X-Workspace-Id": "elsewhere"})
    assert (elsewhere.status_code, code_of(elsewhere)) == (403, "FORBIDDEN")
    assert (method, path) in SCOPES, "say which scope the route needs"
    may = list(Scope)[list(Scope).index(SCOPES[method, path]) :]
    for scope in Scope:
        answer = await call(keys[scope])
        assert (answer.status_code != 403) == (scope in may), (scope, answer.text)
        assert answer.status_code != 401

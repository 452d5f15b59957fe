"""Keys, scopes and the border between workspaces."""

import time
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import API_KEY, Service

ECHO = {"workflowId": "test-echo", "input": {"secret": "known-to-one-tenant"}}


@pytest.fixture
def http(service: Service) -> Any:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=30) as client:
        yield client


def as_key(http: httpx.Client, key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_scopes_allow_what_they_name(http: httpx.Client) -> None:
    keys = {}
    for scope in ("read", "execute", "admin"):
        made = http.post("/v1/keys", json={"name": f"for {scope}", "scopes": [scope]})
        assert made.status_code == 201
        keys[scope] = made.json()["key"]
    execution_id = http.post("/v1/execute", json=ECHO).json()["id"]
    may = {
        ("GET", f"/v1/executions/{execution_id}"): {"read", "execute", "admin"},
        ("POST", "/v1/execute"): {"execute", "admin"},
        ("GET", "/v1/keys"): {"admin"},
    }
    for (method, path), scopes in may.items():
        for scope, key in keys.items():
            answer = http.request(method, path, json=ECHO, headers=as_key(http, key))
            assert answer.status_code == (200 if scope in scopes else 403), (path, scope)
    listed = http.get("/v1/keys").json()["items"]
    assert {"for read", "for execute", "for admin", "first key"} <= {i["name"] for i in listed}
    text = http.get("/v1/keys").text
    assert not any(key in text for key in keys.values())


def test_a_revoked_key_is_refused_within_a_second(http: httpx.Client) -> None:
    made = http.post("/v1/keys", json={"name": "short-lived", "scopes": ["execute"]}).json()
    headers = as_key(http, made["key"])
    assert http.post("/v1/execute", json=ECHO, headers=headers).status_code == 200
    assert http.delete(f"/v1/keys/{made['id']}").status_code == 204
    revoked = time.monotonic()
    while http.post("/v1/execute", json=ECHO, headers=headers).status_code != 401:
        assert time.monotonic() - revoked < 1.5
    assert http.delete(f"/v1/keys/{made['id']}").status_code == 404


def test_a_key_cannot_begin_expired(http: httpx.Client) -> None:
    body = {"name": "old", "scopes": ["read"], "expiresAt": "2001-01-01T00:00:00Z"}
    assert http.post("/v1/keys", json=body).status_code == 422


def test_another_workspace_sees_nothing(http: httpx.Client) -> None:
    made = http.post("/v1/workspaces", json={"id": "tenant-two"})
    assert made.status_code == 201
    assert http.post("/v1/workspaces", json={"id": "tenant-two"}).status_code == 409
    other = as_key(http, made.json()["apiKey"])
    execution_id = http.post("/v1/execute", json=ECHO).json()["id"]
    http.put("/v1/workflows/mine-alone", json={"steps": [{"id": "a", "echo": {}}]})
    key_id = http.get("/v1/keys").json()["items"][0]["id"]
    routes = [
        ("GET", f"/v1/executions/{execution_id}"),
        ("GET", f"/v1/executions/{execution_id}/stream"),
        ("POST", f"/v1/executions/{execution_id}/cancel"),
        ("POST", f"/v1/executions/{execution_id}/retry"),
        ("GET", "/v1/workflows/mine-alone"),
        ("GET", "/v1/workflows/mine-alone/versions"),
        ("DELETE", "/v1/workflows/mine-alone"),
        ("DELETE", f"/v1/keys/{key_id}"),
        ("GET", "/v1/workspaces"),
        ("POST", "/v1/workspaces"),
    ]
    for method, path in routes:
        answer = http.request(method, path, headers=other)
        assert answer.status_code in (403, 404), (method, path, answer.text)
        assert "known-to-one-tenant" not in answer.text
    assert http.get("/v1/executions", headers=other).json()["items"] == []
    assert [i["name"] for i in http.get("/v1/keys", headers=other).json()["items"]] == ["first key"]
    mine = http.post("/v1/execute", json=ECHO, headers=other).json()
    assert http.get(f"/v1/executions/{mine['id']}").status_code == 404
    started = http.post(
        "/v1/execute", json={"workflowId": "mine-alone", "input": {}}, headers=other
    )
    assert started.json()["code"] == "UNKNOWN_WORKFLOW"
    # The same Idempotency-Key in two workspaces is two executions.
    key = {"Idempotency-Key": "shared-by-chance"}
    first = http.post("/v1/execute", json=ECHO, headers=key).json()["id"]
    second = http.post("/v1/execute", json=ECHO, headers={**other, **key}).json()["id"]
    assert first != second

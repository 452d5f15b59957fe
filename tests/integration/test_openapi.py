"""The OpenAPI document is true: clients can be made from it, and hostile clients break nothing."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from openapi_spec_validator import validate
from schemathesis.checks import CHECKS

from serve_app.ingress.app import create_app
from tests.support.api import ADMIN_KEY
from tests.support.live_api import live_api

EXAMPLES = 8  # per operation; all are repeated with ids that exist
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}
SCHEMATHESIS_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def document() -> dict[str, Any]:
    """The document, without a service behind it."""
    services: Any = SimpleNamespace(
        version="test",
        settings=SimpleNamespace(cors_origins=()),
        entropy=None,
        clock=None,
        request_metrics=None,
        is_behind_serve=False,
    )
    return create_app(services).openapi()


DOCUMENT = document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [
    (path, method, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]


@pytest.fixture(scope="module")
def url(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data_dir: Path = tmp_path_factory.mktemp("live")
    with live_api(valkey_url, data_dir, json_depth_max=16) as address:
        yield address


@pytest.fixture(scope="module")
def known(url: str) -> dict[str, str]:
    """An id of each kind that exists."""
    with httpx.Client(base_url=url, headers=HEADERS, timeout=30) as http:
        body = {"workflowId": "test-echo", "input": {"a": 1}}
        execution = http.post("/v1/execute", json=body).json()
        key = http.post("/v1/keys", json={"name": "k", "scopes": ["read"]}).json()
        definition = {"steps": [{"id": "a", "echo": {}}]}
        http.put("/v1/workflows/known", json=definition).raise_for_status()
    return {"execution_id": execution["id"], "key_id": key["id"], "workflow_id": "known"}


def test_the_document_is_valid_openapi() -> None:
    validate(DOCUMENT)


def test_operation_ids_are_unique_names_for_methods() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert sorted(ids) == sorted(set(ids))
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", one) for one in ids)


@pytest.mark.parametrize(
    ("path", "method", "operation"),
    OPERATIONS,
    ids=[f"{method.upper()} {path}" for path, method, _ in OPERATIONS],
)
def test_each_operation_says_what_a_client_must_know(
    path: str, method: str, operation: dict[str, Any]
) -> None:
    assert operation["summary"]
    assert operation["description"]
    if method in {"post", "put", "patch"} and operation.get("requestBody"):
        for kind, content in operation["requestBody"]["content"].items():
            assert content["schema"], kind
            assert "example" in content or kind.startswith("multipart/")
    for status, response in operation["responses"].items():
        assert response["description"]
        if status in {"200", "201", "202"}:
            assert response["content"], status
            assert all(content["schema"] for content in response["content"].values()), status
        if status in {"401", "403", "404", "409", "413", "422", "429"}:
            assert "application/problem+json" in response["content"], status
    in_path = set(re.findall(r"{(\w+)}", path))
    declared = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
    assert in_path == declared


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_the_service(
    case: schemathesis.Case, url: str, known: dict[str, str]
) -> None:
    checks = CHECKS.get_by_names(SCHEMATHESIS_CHECKS)
    case.call_and_validate(base_url=url, headers=HEADERS, checks=checks, timeout=20)
    in_path = case.path_parameters or {}
    if known.keys() & in_path.keys():
        case.path_parameters = {**in_path, **{k: v for k, v in known.items() if k in in_path}}
        case.call_and_validate(base_url=url, headers=HEADERS, checks=checks, timeout=20)

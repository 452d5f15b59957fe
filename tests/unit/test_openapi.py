"""What the OpenAPI document must say of every route, those to come included."""

import re
from typing import Any

import pytest
from openapi_spec_validator import validate

from tests.support.openapi import openapi_document

DOCUMENT = openapi_document()
OPERATIONS = [
    (path, method, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
# Their path says it all.
WITHOUT_BODY = {"cancel_execution", "retry_execution", "test_webhook", "replay_delivery"}


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
    assert operation.get("summary"), path
    assert operation["description"]
    if method in {"post", "put", "patch"} and operation["operationId"] not in WITHOUT_BODY:
        assert "requestBody" in operation, "name its model: openapi_extra=described(Model, ...)"
        for kind, content in operation["requestBody"]["content"].items():
            assert content["schema"], kind
            assert "example" in content or kind.startswith("multipart/"), "described(example=...)"
    for status, response in operation["responses"].items():
        assert response["description"]
        if status in {"200", "201", "202"}:
            assert response["content"], status
            assert all(content["schema"] for content in response["content"].values()), status
        if status in {"401", "403", "404", "409", "413", "422", "429"}:
            assert response["content"], f"{status} has no model: responses=ERRORS"
    in_path = set(re.findall(r"{(\w+)}", path))
    declared = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
    assert in_path == declared

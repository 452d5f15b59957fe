"""The OpenAPI document: what a route says of itself, and what holds for all.

Owns `described`, by which a route names its body and query, and the rules that FastAPI cannot know:
problem+json errors, the ways to authenticate, headers. Invariant: what a route says of itself is
kept, and a client generator can read the result (a test says so).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

_COMPONENTS = "#/components/schemas/"
_KEYLESS_TAG = "health"
_KEY_IN_PATH = ("/e/", "/hooks/")  # or a signature instead of one
_STREAM_TOKEN_PATHS = ("/stream", "/v1/executions/{execution_id}/stream")
_KEYS: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "streamToken": {
        "type": "apiKey",
        "in": "query",
        "name": "token",
        "description": "From `POST /v1/stream-tokens`, for the one path it names.",
    },
}
_HEADERS = {
    "X-Request-Id": {
        "description": "The id that was sent, or else one of ours; the log has it.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}},
    "RateLimit-Limit": {
        "description": "Of a limited key: the limit that binds it.",
        "schema": {"type": "integer"},
    },
    "RateLimit-Remaining": {"schema": {"type": "integer"}},
    "RateLimit-Reset": {"description": "Seconds.", "schema": {"type": "integer"}},
    "X-Execution-Id": {"schema": {"type": "string"}},
    "Idempotency-Replayed": {
        "description": "`true`: this is the first answer under the Idempotency-Key, again.",
        "schema": {"type": "string", "enum": ["true"]},
    },
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key and body give the first answer again, for 24 h.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The id of the last event seen; it wins over `after`.",
    "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"},
}
SSE = {
    "description": "Events as server-sent events; `id` is the cursor to go on from.",
    "content": {
        "text/event-stream": {
            "schema": {  # of one event: OpenAPI 3.1 has no word for a stream of them
                "type": "object",
                "required": ["event", "data"],
                "properties": {
                    "id": {"type": "string", "pattern": "^[0-9]+$"},
                    "event": {"type": "string"},
                    "data": {"type": "string", "contentMediaType": "application/json"},
                },
            },
            "example": 'id: 3\nevent: chunk\ndata: {"data":"Hel","step":"answer",'
            '"executionId":"exe_00a","timestamp":"2026-11-21T08:00:00.000Z"}\n\n',
        }
    },
}


def described(
    body: type[BaseModel] | Mapping[str, object] | None = None,
    *,
    example: Mapping[str, object] | None = None,
    is_required: bool = True,
    query: Mapping[str, tuple[Mapping[str, object], str]] | None = None,
    headers: tuple[Mapping[str, object], ...] = (),
) -> dict[str, Any]:
    """What a route hands to FastAPI as `openapi_extra`.

    Args:
        body: the model of its JSON body, which the route reads by itself, or a JSON Schema.
        example: a body that works.
        is_required: whether there must be a body.
        query: schema and description by name.
        headers: parameters such as IDEMPOTENCY_KEY.
    """
    parameters: list[dict[str, object]] = [dict(header) for header in headers]
    for name, (values, text) in (query or {}).items():
        parameters.append({"name": name, "in": "query", "description": text, "schema": values})
    extra: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if body is not None:
        schema = body if isinstance(body, Mapping) else body.model_json_schema(by_alias=True)
        content: dict[str, object] = {"schema": schema}
        if example is not None:
            content["example"] = example
        extra["requestBody"] = {"required": is_required, "content": {"application/json": content}}
    return extra


def operation_id(route: APIRoute) -> str:
    """The name of the handler, which is a client's method name."""
    return route.name


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The document of an application, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _complete(document)
        app.openapi_schema = document
    return app.openapi_schema


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    components["securitySchemes"] = _SECURITY_SCHEMES
    components["headers"] = _HEADERS
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    document["security"] = _KEYS
    for path, operation in _operations(document):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            content["schema"] = _named(content["schema"], schemas)
        if _KEYLESS_TAG in operation.get("tags", ()) or path.startswith(_KEY_IN_PATH):
            operation["security"] = []
        elif path.startswith(_STREAM_TOKEN_PATHS):
            operation["security"] = [*_KEYS, {"streamToken": []}]
        for status in _impossible(path, operation):
            operation["responses"].pop(status, None)
        for status, response in operation["responses"].items():
            _describe_response(status, response, operation)


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["x-method"] = method
            yield path, operation
            del operation["x-method"]


def _impossible(path: str, operation: dict[str, Any]) -> set[str]:
    """Statuses of the common list that this operation cannot answer with."""
    has_body = "requestBody" in operation
    found: set[str] = set() if has_body else {"413"}
    if operation["x-method"] == "get":
        found.add("409")
    if "{" not in path and not has_body:
        found.add("404")
    return found


def _describe_response(status: str, response: dict[str, Any], operation: dict[str, Any]) -> None:
    names = ["X-Request-Id"]
    content = response.get("content", {})
    if status >= "400" and "application/json" in content and _is_problem(content):
        content["application/problem+json"] = content.pop("application/json")
    if operation.get("security") != []:
        names += ["RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"]
    if status in {"429", "503"}:
        names.append("Retry-After")
    sent = [parameter["name"] for parameter in operation.get("parameters", ())]
    if status.startswith("2") and "Idempotency-Key" in sent:
        names.append("Idempotency-Replayed")
    headers = response.setdefault("headers", {})
    for name in names:
        headers.setdefault(name, {"$ref": f"#/components/headers/{name}"})


def _is_problem(content: dict[str, Any]) -> bool:
    schema = content["application/json"].get("schema", {})
    return str(schema.get("$ref")).endswith("Problem")  # ours, or one with more members


def _named(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference in the place of an inline model; it and what it is made of become components."""
    if "title" not in schema or "properties" not in schema:
        return schema
    schema = _repointed(schema)
    for name, part in schema.pop("$defs", {}).items():
        schemas.setdefault(name, part)
    schemas.setdefault(schema["title"], schema)
    return {"$ref": _COMPONENTS + schema["title"]}


def _repointed(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: part.replace("#/$defs/", _COMPONENTS) if key == "$ref" else _repointed(part)
            for key, part in value.items()
        }
    return [_repointed(part) for part in value] if isinstance(value, list) else value

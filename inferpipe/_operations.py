"""Every call of the API as a value: what to send, how to read it.

Owns paths, bodies and the type of each answer. Does no I/O. Invariant: the sync and the async
client build the same operation in the method of the same name, so the two cannot drift apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel

from inferpipe import _calls as calls
from inferpipe._calls import Answer, Call
from inferpipe._config import ExecuteOptions, KeyLimits, WebhookOptions
from inferpipe._stream import completed
from inferpipe.errors import InferPipeProtocolError
from inferpipe.wire import (
    DeliveryList,
    DeliveryStatus,
    DeliveryView,
    ExecutionInfo,
    ExecutionList,
    ExecutionRecord,
    ExecutionResult,
    ExecutionStatus,
    HealthStatus,
    HostList,
    HostRequirements,
    HostView,
    KeyList,
    KeyRequest,
    KeyView,
    Replayed,
    ReplayRequest,
    RotateSecretRequest,
    SessionMessageList,
    SessionRequest,
    SessionView,
    SignalRequest,
    StreamTokenRequest,
    StreamTokenView,
    UsageReport,
    Validation,
    WebhookList,
    WebhookPatch,
    WebhookRequest,
    WebhookSecret,
    WebhookView,
    WorkflowList,
    WorkflowView,
    WorkspaceList,
    WorkspaceRequest,
    WorkspaceView,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
ModelT = TypeVar("ModelT", bound=BaseModel)

JSON_HEADERS = {"content-type": "application/json"}
YAML_HEADERS = {"content-type": "application/yaml"}


@dataclass(frozen=True, slots=True)
class Operation(Generic[T_co]):
    """One call, and what its answer means."""

    call: Call
    read: Callable[[Answer], T_co]


class Page(Protocol[T_co]):
    """A part of a list, and where the next part begins; None at the end."""

    @property
    def items(self) -> Sequence[T_co]:
        """In the server's order."""
        ...

    @property
    def next_cursor(self) -> str | None:
        """For the next call."""
        ...


def next_cursor(page: Page[object], cursor: str | None) -> str | None:
    """Return where the next page begins; None where this is the last.

    Raises:
        InferPipeProtocolError: it begins where this one did, and would without end.
    """
    if page.next_cursor is not None and page.next_cursor == cursor:
        raise InferPipeProtocolError(f"the page after {cursor!r} names itself as the next one")
    return page.next_cursor


Definition = Mapping[str, Any] | str
"""A workflow's definition: an object, or the text of a YAML file."""


def execute(
    workflow_id: str, workflow_input: Mapping[str, Any], options: ExecuteOptions
) -> Operation[ExecutionResult]:
    """`POST /v1/execute`; its reading raises unless the execution completed."""

    def read(answer: Answer) -> ExecutionResult:
        return completed(calls.read_model(answer, ExecutionResult))

    return Operation(calls.execute_call(calls.EXECUTE, workflow_id, workflow_input, options), read)


def execute_async(
    workflow_id: str, workflow_input: Mapping[str, Any], options: ExecuteOptions
) -> Operation[ExecutionInfo]:
    """`POST /v1/execute/async`."""
    call = calls.execute_call(calls.EXECUTE_ASYNC, workflow_id, workflow_input, options)
    return _read(call, ExecutionInfo)


def get_execution(execution_id: str) -> Operation[ExecutionRecord]:
    """`GET /v1/executions/{id}`."""
    return _read(calls.execution_call(execution_id), ExecutionRecord)


def list_executions(
    workflow_id: str | None,
    status: ExecutionStatus | None,
    page_size: int | None,
    cursor: str | None,
) -> Operation[ExecutionList]:
    """`GET /v1/executions`."""
    query = {"workflowId": workflow_id, "status": status, "limit": page_size, "cursor": cursor}
    return _read(_get("/v1/executions", query), ExecutionList)


def cancel_execution(execution_id: str) -> Operation[None]:
    """`POST /v1/executions/{id}/cancel`."""
    return Operation(_post(_execution(execution_id, "/cancel")), _nothing)


def retry_execution(execution_id: str, from_step: str | None) -> Operation[ExecutionInfo]:
    """`POST /v1/executions/{id}/retry`."""
    path = _with_query(_execution(execution_id, "/retry"), {"fromStep": from_step})
    return _read(_post(path), ExecutionInfo)


def signal_execution(execution_id: str, name: str, data: Any) -> Operation[None]:
    """`POST /v1/executions/{id}/signal`."""
    body = {"name": name, "data": data}
    call = _post(_execution(execution_id, "/signal"), calls.body_of(SignalRequest, body))
    return Operation(call, _nothing)


def put_workflow(workflow_id: str, definition: Definition) -> Operation[WorkflowView]:
    """`PUT /v1/workflows/{id}`."""
    content, headers = _definition(definition)
    call = Call("PUT", calls.path_below("/v1/workflows", workflow_id), headers, content)
    return _read(call, WorkflowView)


def get_workflow(workflow_id: str, version: int | None) -> Operation[WorkflowView]:
    """`GET /v1/workflows/{id}`."""
    path = calls.path_below("/v1/workflows", workflow_id)
    return _read(_get(path, {"version": version}), WorkflowView)


def list_workflows(cursor: str | None) -> Operation[WorkflowList]:
    """`GET /v1/workflows`."""
    return _read(_get("/v1/workflows", {"cursor": cursor}), WorkflowList)


def list_versions(workflow_id: str, cursor: str | None) -> Operation[WorkflowList]:
    """`GET /v1/workflows/{id}/versions`."""
    path = calls.path_below("/v1/workflows", workflow_id) + "/versions"
    return _read(_get(path, {"cursor": cursor}), WorkflowList)


def delete_workflow(workflow_id: str) -> Operation[None]:
    """`DELETE /v1/workflows/{id}`."""
    return _delete(calls.path_below("/v1/workflows", workflow_id))


def validate_workflow(workflow_id: str, definition: Definition) -> Operation[Validation]:
    """`POST /v1/workflows/{id}/validate`."""
    content, headers = _definition(definition)
    path = calls.path_below("/v1/workflows", workflow_id) + "/validate"
    return _read(Call("POST", path, headers, content), Validation)


def create_key(
    name: str, scopes: Sequence[str], expires_at: datetime | None, limits: KeyLimits
) -> Operation[KeyView]:
    """`POST /v1/keys`."""
    given = _given({"name": name, "scopes": list(scopes), "expires_at": expires_at, **limits})
    return _read(_post("/v1/keys", calls.body_of(KeyRequest, given)), KeyView)


def list_keys(cursor: str | None) -> Operation[KeyList]:
    """`GET /v1/keys`."""
    return _read(_get("/v1/keys", {"cursor": cursor}), KeyList)


def revoke_key(key_id: str) -> Operation[None]:
    """`DELETE /v1/keys/{id}`."""
    return _delete(calls.path_below("/v1/keys", key_id))


def create_workspace(workspace_id: str, name: str | None) -> Operation[WorkspaceView]:
    """`POST /v1/workspaces`."""
    body = calls.body_of(WorkspaceRequest, _given({"id": workspace_id, "name": name}))
    return _read(_post("/v1/workspaces", body), WorkspaceView)


def list_workspaces(cursor: str | None) -> Operation[WorkspaceList]:
    """`GET /v1/workspaces`."""
    return _read(_get("/v1/workspaces", {"cursor": cursor}), WorkspaceList)


def create_webhook(
    url: str, events: Sequence[str], options: WebhookOptions
) -> Operation[WebhookView]:
    """`POST /v1/webhooks`."""
    given = {"url": url, "events": list(events), **options}
    return _read(_post("/v1/webhooks", calls.body_of(WebhookRequest, given)), WebhookView)


def get_webhook(webhook_id: str) -> Operation[WebhookView]:
    """`GET /v1/webhooks/{id}`."""
    return _read(_get(_webhook(webhook_id)), WebhookView)


def list_webhooks(cursor: str | None) -> Operation[WebhookList]:
    """`GET /v1/webhooks`."""
    return _read(_get("/v1/webhooks", {"cursor": cursor}), WebhookList)


def update_webhook(webhook_id: str, changes: Mapping[str, Any]) -> Operation[WebhookView]:
    """`PATCH /v1/webhooks/{id}`; what is None in `changes` is set to null."""
    content = calls.body_of(WebhookPatch, changes)
    return _read(Call("PATCH", _webhook(webhook_id), JSON_HEADERS, content), WebhookView)


def delete_webhook(webhook_id: str) -> Operation[None]:
    """`DELETE /v1/webhooks/{id}`."""
    return _delete(_webhook(webhook_id))


def test_webhook(webhook_id: str) -> Operation[DeliveryView]:
    """`POST /v1/webhooks/{id}/test`."""
    return _read(_post(_webhook(webhook_id, "/test")), DeliveryView)


def rotate_secret(webhook_id: str, overlap_ms: int | None) -> Operation[WebhookSecret]:
    """`POST /v1/webhooks/{id}/rotate-secret`."""
    body = calls.body_of(RotateSecretRequest, _given({"overlap": overlap_ms}))
    return _read(_post(_webhook(webhook_id, "/rotate-secret"), body), WebhookSecret)


def get_delivery(delivery_id: str) -> Operation[DeliveryView]:
    """`GET /v1/deliveries/{id}`."""
    return _read(_get(calls.path_below("/v1/deliveries", delivery_id)), DeliveryView)


def list_deliveries(
    webhook_id: str, status: DeliveryStatus | None, page_size: int | None, cursor: str | None
) -> Operation[DeliveryList]:
    """`GET /v1/webhooks/{id}/deliveries`."""
    query = {"status": status, "limit": page_size, "cursor": cursor}
    return _read(_get(_webhook(webhook_id, "/deliveries"), query), DeliveryList)


def replay_delivery(delivery_id: str) -> Operation[DeliveryView]:
    """`POST /v1/deliveries/{id}/replay`."""
    path = calls.path_below("/v1/deliveries", delivery_id) + "/replay"
    return _read(_post(path), DeliveryView)


def replay_webhook(
    webhook_id: str, status: DeliveryStatus | None, from_: datetime | None, to: datetime | None
) -> Operation[Replayed]:
    """`POST /v1/webhooks/{id}/replay`."""
    body = calls.body_of(ReplayRequest, _given({"status": status, "from": from_, "to": to}))
    return _read(_post(_webhook(webhook_id, "/replay"), body), Replayed)


def create_stream_token(resource: str, ttl_s: int | None) -> Operation[StreamTokenView]:
    """`POST /v1/stream-tokens`."""
    body = calls.body_of(StreamTokenRequest, _given({"resource": resource, "ttl": ttl_s}))
    return _read(_post("/v1/stream-tokens", body), StreamTokenView)


def list_hosts() -> Operation[Sequence[HostView]]:
    """`GET /v1/hosts`."""

    def read(answer: Answer) -> Sequence[HostView]:
        return calls.read_model(answer, HostList).hosts

    return Operation(_get("/v1/hosts"), read)


def select_host(
    model: str, min_stake: str | None, max_latency: int | None, region: str | None
) -> Operation[HostView]:
    """`POST /v1/hosts/select`."""
    wish = {"minStake": min_stake, "maxLatency": max_latency, "region": region}
    body = calls.body_of(HostRequirements, _given({"model": model, **wish}))
    return _read(_post("/v1/hosts/select", body), HostView)


def create_session(model: str, system: str | None) -> Operation[SessionView]:
    """`POST /v1/sessions`."""
    body = calls.body_of(SessionRequest, _given({"model": model, "system": system}))
    return _read(_post("/v1/sessions", body), SessionView)


def get_session(session_id: str) -> Operation[SessionView]:
    """`GET /v1/sessions/{id}`."""
    return _read(_get(_session(session_id)), SessionView)


def list_session_messages(session_id: str, cursor: str | None) -> Operation[SessionMessageList]:
    """`GET /v1/sessions/{id}/messages`."""
    path = _session(session_id) + "/messages"
    return _read(_get(path, {"cursor": cursor}), SessionMessageList)


def end_session(session_id: str) -> Operation[None]:
    """`DELETE /v1/sessions/{id}`."""
    return _delete(_session(session_id))


def usage(
    from_: datetime | None, to: datetime | None, group_by: str | None
) -> Operation[UsageReport]:
    """`GET /v1/usage`."""
    query = {
        "from": None if from_ is None else calls.moment(from_),
        "to": None if to is None else calls.moment(to),
        "groupBy": group_by,
    }
    return _read(_get("/v1/usage", query), UsageReport)


def health() -> Operation[HealthStatus]:
    """`GET /v1/health`."""
    return Operation(calls.health_call(), calls.read_health)


def _read(call: Call, model: type[ModelT]) -> Operation[ModelT]:
    def read(answer: Answer) -> ModelT:
        return calls.read_model(answer, model)

    return Operation(call, read)


def _session(session_id: str) -> str:
    return calls.path_below("/v1/sessions", session_id)


def _nothing(_: Answer) -> None:
    return None


def _get(path: str, query: Mapping[str, object] | None = None) -> Call:
    return Call("GET", _with_query(path, query or {}))


def _post(path: str, content: bytes | None = None) -> Call:
    return Call("POST", path, {} if content is None else JSON_HEADERS, content)


def _delete(path: str) -> Operation[None]:
    return Operation(Call("DELETE", path), _nothing)


def _with_query(path: str, query: Mapping[str, object]) -> str:
    given = _given(query)
    return f"{path}?{urlencode(given)}" if given else path


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _execution(execution_id: str, suffix: str) -> str:
    return calls.path_below("/v1/executions", execution_id) + suffix


def _webhook(webhook_id: str, suffix: str = "") -> str:
    return calls.path_below("/v1/webhooks", webhook_id) + suffix


def _definition(definition: Definition) -> tuple[bytes, Mapping[str, str]]:
    if isinstance(definition, str):
        return definition.encode(), YAML_HEADERS
    return calls.json_bytes(definition, "the definition"), JSON_HEADERS

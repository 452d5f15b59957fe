"""Every call of the API as a value: what to send, how to read it.

Owns paths, bodies and the type of each answer. Does no I/O. Invariant: the sync and the async
client build the same operation in the method of the same name, so the two cannot drift apart.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from inferpipe import _calls as calls
from inferpipe._calls import Answer, Call
from inferpipe._config import ExecuteOptions, KeyLimits, WebhookOptions
from inferpipe._operation import (
    JSON_HEADERS,
    Operation,
    delete,
    get,
    given,
    nothing,
    post,
    reading,
    with_query,
)
from inferpipe._stream import completed
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

YAML_HEADERS = {"content-type": "application/yaml"}


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
    return reading(call, ExecutionInfo)


def get_execution(execution_id: str) -> Operation[ExecutionRecord]:
    """`GET /v1/executions/{id}`."""
    return reading(calls.execution_call(execution_id), ExecutionRecord)


def list_executions(
    workflow_id: str | None,
    status: ExecutionStatus | None,
    page_size: int | None,
    cursor: str | None,
) -> Operation[ExecutionList]:
    """`GET /v1/executions`."""
    query = {"workflowId": workflow_id, "status": status, "limit": page_size, "cursor": cursor}
    return reading(get("/v1/executions", query), ExecutionList)


def cancel_execution(execution_id: str) -> Operation[None]:
    """`POST /v1/executions/{id}/cancel`."""
    return Operation(post(_execution(execution_id, "/cancel")), nothing)


def retry_execution(execution_id: str, from_step: str | None) -> Operation[ExecutionInfo]:
    """`POST /v1/executions/{id}/retry`."""
    path = with_query(_execution(execution_id, "/retry"), {"fromStep": from_step})
    return reading(post(path), ExecutionInfo)


def signal_execution(execution_id: str, name: str, data: Any) -> Operation[None]:
    """`POST /v1/executions/{id}/signal`."""
    body = {"name": name, "data": data}
    call = post(_execution(execution_id, "/signal"), calls.body_of(SignalRequest, body))
    return Operation(call, nothing)


def put_workflow(workflow_id: str, definition: Definition) -> Operation[WorkflowView]:
    """`PUT /v1/workflows/{id}`."""
    content, headers = _definition(definition)
    call = Call("PUT", calls.path_below("/v1/workflows", workflow_id), headers, content)
    return reading(call, WorkflowView)


def get_workflow(workflow_id: str, version: int | None) -> Operation[WorkflowView]:
    """`GET /v1/workflows/{id}`."""
    path = calls.path_below("/v1/workflows", workflow_id)
    return reading(get(path, {"version": version}), WorkflowView)


def list_workflows(cursor: str | None) -> Operation[WorkflowList]:
    """`GET /v1/workflows`."""
    return reading(get("/v1/workflows", {"cursor": cursor}), WorkflowList)


def list_versions(workflow_id: str, cursor: str | None) -> Operation[WorkflowList]:
    """`GET /v1/workflows/{id}/versions`."""
    path = calls.path_below("/v1/workflows", workflow_id) + "/versions"
    return reading(get(path, {"cursor": cursor}), WorkflowList)


def delete_workflow(workflow_id: str) -> Operation[None]:
    """`DELETE /v1/workflows/{id}`."""
    return delete(calls.path_below("/v1/workflows", workflow_id))


def validate_workflow(workflow_id: str, definition: Definition) -> Operation[Validation]:
    """`POST /v1/workflows/{id}/validate`."""
    content, headers = _definition(definition)
    path = calls.path_below("/v1/workflows", workflow_id) + "/validate"
    return reading(Call("POST", path, headers, content), Validation)


def create_key(
    name: str, scopes: Sequence[str], expires_at: datetime | None, limits: KeyLimits
) -> Operation[KeyView]:
    """`POST /v1/keys`."""
    wish = given({"name": name, "scopes": list(scopes), "expires_at": expires_at, **limits})
    return reading(post("/v1/keys", calls.body_of(KeyRequest, wish)), KeyView)


def list_keys(cursor: str | None) -> Operation[KeyList]:
    """`GET /v1/keys`."""
    return reading(get("/v1/keys", {"cursor": cursor}), KeyList)


def revoke_key(key_id: str) -> Operation[None]:
    """`DELETE /v1/keys/{id}`."""
    return delete(calls.path_below("/v1/keys", key_id))


def create_workspace(workspace_id: str, name: str | None) -> Operation[WorkspaceView]:
    """`POST /v1/workspaces`."""
    body = calls.body_of(WorkspaceRequest, given({"id": workspace_id, "name": name}))
    return reading(post("/v1/workspaces", body), WorkspaceView)


def list_workspaces(cursor: str | None) -> Operation[WorkspaceList]:
    """`GET /v1/workspaces`."""
    return reading(get("/v1/workspaces", {"cursor": cursor}), WorkspaceList)


def create_webhook(
    url: str, events: Sequence[str], options: WebhookOptions
) -> Operation[WebhookView]:
    """`POST /v1/webhooks`."""
    wish = {"url": url, "events": list(events), **options}
    return reading(post("/v1/webhooks", calls.body_of(WebhookRequest, wish)), WebhookView)


def get_webhook(webhook_id: str) -> Operation[WebhookView]:
    """`GET /v1/webhooks/{id}`."""
    return reading(get(_webhook(webhook_id)), WebhookView)


def list_webhooks(cursor: str | None) -> Operation[WebhookList]:
    """`GET /v1/webhooks`."""
    return reading(get("/v1/webhooks", {"cursor": cursor}), WebhookList)


def update_webhook(webhook_id: str, changes: Mapping[str, Any]) -> Operation[WebhookView]:
    """`PATCH /v1/webhooks/{id}`; what is None in `changes` is set to null."""
    content = calls.body_of(WebhookPatch, changes)
    return reading(Call("PATCH", _webhook(webhook_id), JSON_HEADERS, content), WebhookView)


def delete_webhook(webhook_id: str) -> Operation[None]:
    """`DELETE /v1/webhooks/{id}`."""
    return delete(_webhook(webhook_id))


def test_webhook(webhook_id: str) -> Operation[DeliveryView]:
    """`POST /v1/webhooks/{id}/test`."""
    return reading(post(_webhook(webhook_id, "/test")), DeliveryView)


def rotate_secret(webhook_id: str, overlap_ms: int | None) -> Operation[WebhookSecret]:
    """`POST /v1/webhooks/{id}/rotate-secret`."""
    body = calls.body_of(RotateSecretRequest, given({"overlap": overlap_ms}))
    return reading(post(_webhook(webhook_id, "/rotate-secret"), body), WebhookSecret)


def get_delivery(delivery_id: str) -> Operation[DeliveryView]:
    """`GET /v1/deliveries/{id}`."""
    return reading(get(calls.path_below("/v1/deliveries", delivery_id)), DeliveryView)


def list_deliveries(
    webhook_id: str, status: DeliveryStatus | None, page_size: int | None, cursor: str | None
) -> Operation[DeliveryList]:
    """`GET /v1/webhooks/{id}/deliveries`."""
    query = {"status": status, "limit": page_size, "cursor": cursor}
    return reading(get(_webhook(webhook_id, "/deliveries"), query), DeliveryList)


def replay_delivery(delivery_id: str) -> Operation[DeliveryView]:
    """`POST /v1/deliveries/{id}/replay`."""
    path = calls.path_below("/v1/deliveries", delivery_id) + "/replay"
    return reading(post(path), DeliveryView)


def replay_webhook(
    webhook_id: str, status: DeliveryStatus | None, from_: datetime | None, to: datetime | None
) -> Operation[Replayed]:
    """`POST /v1/webhooks/{id}/replay`."""
    body = calls.body_of(ReplayRequest, given({"status": status, "from": from_, "to": to}))
    return reading(post(_webhook(webhook_id, "/replay"), body), Replayed)


def create_stream_token(resource: str, ttl_s: int | None) -> Operation[StreamTokenView]:
    """`POST /v1/stream-tokens`."""
    body = calls.body_of(StreamTokenRequest, given({"resource": resource, "ttl": ttl_s}))
    return reading(post("/v1/stream-tokens", body), StreamTokenView)


def list_hosts() -> Operation[Sequence[HostView]]:
    """`GET /v1/hosts`."""

    def read(answer: Answer) -> Sequence[HostView]:
        return calls.read_model(answer, HostList).hosts

    return Operation(get("/v1/hosts"), read)


def select_host(
    model: str, min_stake: str | None, max_latency: int | None, region: str | None
) -> Operation[HostView]:
    """`POST /v1/hosts/select`."""
    wish = {"minStake": min_stake, "maxLatency": max_latency, "region": region}
    body = calls.body_of(HostRequirements, given({"model": model, **wish}))
    return reading(post("/v1/hosts/select", body), HostView)


def create_session(model: str, system: str | None) -> Operation[SessionView]:
    """`POST /v1/sessions`."""
    body = calls.body_of(SessionRequest, given({"model": model, "system": system}))
    return reading(post("/v1/sessions", body), SessionView)


def get_session(session_id: str) -> Operation[SessionView]:
    """`GET /v1/sessions/{id}`."""
    return reading(get(_session(session_id)), SessionView)


def list_session_messages(session_id: str, cursor: str | None) -> Operation[SessionMessageList]:
    """`GET /v1/sessions/{id}/messages`."""
    path = _session(session_id) + "/messages"
    return reading(get(path, {"cursor": cursor}), SessionMessageList)


def end_session(session_id: str) -> Operation[None]:
    """`DELETE /v1/sessions/{id}`."""
    return delete(_session(session_id))


def usage(
    from_: datetime | None, to: datetime | None, group_by: str | None
) -> Operation[UsageReport]:
    """`GET /v1/usage`."""
    query = {
        "from": None if from_ is None else calls.moment(from_),
        "to": None if to is None else calls.moment(to),
        "groupBy": group_by,
    }
    return reading(get("/v1/usage", query), UsageReport)


def health() -> Operation[HealthStatus]:
    """`GET /v1/health`."""
    return Operation(calls.health_call(), calls.read_health)


def _session(session_id: str) -> str:
    return calls.path_below("/v1/sessions", session_id)


def _execution(execution_id: str, suffix: str) -> str:
    return calls.path_below("/v1/executions", execution_id) + suffix


def _webhook(webhook_id: str, suffix: str = "") -> str:
    return calls.path_below("/v1/webhooks", webhook_id) + suffix


def _definition(definition: Definition) -> tuple[bytes, Mapping[str, str]]:
    if isinstance(definition, str):
        return definition.encode(), YAML_HEADERS
    return calls.json_bytes(definition, "the definition"), JSON_HEADERS

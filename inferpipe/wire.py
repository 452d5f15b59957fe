"""The JSON that client and server exchange, and the SSE framing around it.

Owns the shapes of `POST /v1/execute*`, `/v1/executions/{id}`, `/v1/health` and of error bodies.
Both sides import it, so it needs pydantic only. Invariant: attributes are snake_case, the wire is
camelCase; what the server sends may grow members, so answers ignore unknown ones, while requests
refuse them.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictInt

from inferpipe._sse import (
    EVENT_BYTES_MAX,
    ServerSentEvent,
    SseDecoder,
    SseTooLargeError,
    encode_sse,
)
from inferpipe._wire_base import Count, RequestModel, Timestamp, WireModel
from inferpipe._wire_delivery import (
    DeliveryAttempt,
    DeliveryList,
    DeliveryStatus,
    DeliveryView,
    Replayed,
    ReplayRequest,
    RotateSecretRequest,
    SignalRequest,
    StreamTokenRequest,
    StreamTokenView,
    UsageItem,
    UsageReport,
    WebhookList,
    WebhookPatch,
    WebhookRequest,
    WebhookSecret,
    WebhookView,
)
from inferpipe._wire_session import (
    HostList,
    HostRequirements,
    HostView,
    SessionMessageList,
    SessionMessageView,
    SessionRequest,
    SessionView,
)
from inferpipe._wire_socket import (
    SOCKET_REQUEST_ID_MAX,
    AuthMessage,
    AuthOkMessage,
    CancelMessage,
    ChunkMessage,
    ClientMessage,
    EndMessage,
    ErrorMessage,
    InferenceMessage,
    ServerMessage,
    SocketEndReason,
    SocketError,
    SocketInference,
    SocketUsage,
)
from inferpipe._wire_tenants import (
    KeyList,
    KeyRequest,
    KeyView,
    RateLimit,
    TokenLimit,
    WorkspaceList,
    WorkspaceRequest,
    WorkspaceView,
)
from inferpipe._wire_triggers import HookDelivery, HookRequest, HookView, TriggerView

__all__ = [
    "EVENT_BYTES_MAX",
    "SOCKET_REQUEST_ID_MAX",
    "TERMINAL_STATUSES",
    "AuthMessage",
    "AuthOkMessage",
    "CacheConfig",
    "CancelMessage",
    "ChunkMessage",
    "ClientMessage",
    "DeliveryAttempt",
    "DeliveryList",
    "DeliveryStatus",
    "DeliveryView",
    "EndMessage",
    "ErrorMessage",
    "ExecuteRequest",
    "ExecutionInfo",
    "ExecutionList",
    "ExecutionRecord",
    "ExecutionResult",
    "ExecutionStatus",
    "HealthStatus",
    "HookDelivery",
    "HookRequest",
    "HookView",
    "HostList",
    "HostRequirements",
    "HostView",
    "InferenceMessage",
    "KeyList",
    "KeyRequest",
    "KeyView",
    "Problem",
    "ProblemItem",
    "RateLimit",
    "ReplayRequest",
    "Replayed",
    "RetryConfig",
    "RotateSecretRequest",
    "ServerMessage",
    "ServerSentEvent",
    "SessionMessageList",
    "SessionMessageView",
    "SessionRequest",
    "SessionView",
    "SignalRequest",
    "SocketEndReason",
    "SocketError",
    "SocketInference",
    "SocketUsage",
    "SseDecoder",
    "SseTooLargeError",
    "StepView",
    "StreamTokenRequest",
    "StreamTokenView",
    "TimingView",
    "TokenLimit",
    "TriggerView",
    "UsageItem",
    "UsageReport",
    "UsageView",
    "Validation",
    "WaitView",
    "WebhookList",
    "WebhookPatch",
    "WebhookRequest",
    "WebhookSecret",
    "WebhookView",
    "WireModel",
    "WorkflowList",
    "WorkflowView",
    "WorkspaceList",
    "WorkspaceRequest",
    "WorkspaceView",
    "encode_sse",
]

DURATION_MS_MAX = 365 * 24 * 3600 * 1000  # a year: longer is a mistake in units
RETRY_ATTEMPTS_MAX = 1000  # enough for any cure by waiting; a bound on what one caller may queue
USER_ID_MAX = 256

ExecutionStatus = Literal[
    "pending", "running", "waiting", "cancelling", "completed", "failed", "cancelled"
]
TERMINAL_STATUSES: frozenset[ExecutionStatus] = frozenset({"completed", "failed", "cancelled"})

# Strict: JSON's "1000" and true are no numbers of milliseconds.
DurationMs = Annotated[StrictInt, Field(le=DURATION_MS_MAX)]


class RetryConfig(RequestModel):
    """How the server retries the execution; overrides the workflow's own `retry`.

    `attempts` counts the tries after the first; `max_delay` is in ms. What is None here is the
    server's choice.
    """

    attempts: Annotated[StrictInt, Field(ge=0, le=RETRY_ATTEMPTS_MAX)]
    backoff: Literal["fixed", "exponential"] | None = None
    max_delay: Annotated[DurationMs, Field(ge=0)] | None = None


class CacheConfig(RequestModel):
    """Whether an earlier result of the same workflow and input will do; `ttl` is in seconds."""

    ttl: Annotated[StrictInt, Field(gt=0, le=DURATION_MS_MAX // 1000)]


class ExecuteRequest(RequestModel):
    """The body of every call that starts an execution.

    `timeout` is in ms, runs from acceptance and includes the queue. A higher `priority` goes
    first; 0 is the middle.
    """

    workflow_id: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]
    timeout: Annotated[DurationMs, Field(gt=0)] | None = None
    retry_config: RetryConfig | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    user_id: Annotated[str, Field(min_length=1, max_length=USER_ID_MAX)] | None = None
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] = 0
    cache: CacheConfig | None = None


class ExecutionInfo(WireModel):
    """What a start answers: enough to ask again. `retry_of` is there for a retry alone."""

    id: str
    status: ExecutionStatus
    retry_of: str | None = None


class UsageView(WireModel):
    """Tokens as the engine counted them; a cache hit has none."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    total_tokens: Count = 0


class TimingView(WireModel):
    """Milliseconds in the queue, running, and from acceptance to the end."""

    queued_ms: Count = 0
    run_ms: Count = 0
    total_ms: Count = 0


class ExecutionResult(WireModel):
    """An execution's outcome. `metadata` is the caller's own, as given; `attempts` is all tries."""

    id: str
    status: ExecutionStatus
    data: Any = None
    error: str | None = None
    error_code: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    usage: UsageView = Field(default_factory=UsageView)
    timing: TimingView = Field(default_factory=TimingView)
    attempts: Count = 0
    workflow_id: str
    workflow_version: int
    cached: bool = False


class WaitView(WireModel):
    """What a step waits for: a moment, an event or a signal, whichever comes first."""

    until: Timestamp | None = None
    event: str | None = None
    message: str | None = None


class StepView(WireModel):
    """One step of an execution's record. `waiting` is there while it waits.

    `resumed` is there where its answer lost a replica or a worker and went on: `exact`, or
    `approximate` where the rest was sampled anew.
    """

    id: str
    type: str
    status: str
    attempts: Count = 0
    started_at: Timestamp | None = None
    completed_at: Timestamp | None = None
    output: Any = None
    error: str | None = None
    usage: UsageView | None = None
    waiting: WaitView | None = None
    resumed: str | None = None


class ExecutionRecord(ExecutionResult):
    """Everything `GET /v1/executions/{id}` tells, at any time of the execution's life."""

    progress: Annotated[float, Field(ge=0, le=100)] = 0
    retry_of: str | None = None
    user_id: str | None = None
    trigger: TriggerView | None = None
    created_at: Timestamp
    started_at: Timestamp | None = None
    completed_at: Timestamp | None = None
    steps: list[StepView] = Field(default_factory=list)


class ExecutionList(WireModel):
    """A page of executions, newest first; their `data` and `steps` are left out."""

    items: list[ExecutionRecord] = Field(default_factory=list)
    next_cursor: str | None = None


class WorkflowView(WireModel):
    """A stored definition: its own keys, the version and when that was stored."""

    model_config = ConfigDict(extra="allow")

    id: str
    version: int
    created_at: Timestamp


class WorkflowList(WireModel):
    """A page of definitions."""

    items: list[WorkflowView] = Field(default_factory=list)
    next_cursor: str | None = None


class Validation(WireModel):
    """Whether a definition would be accepted, and what is wrong with it."""

    valid: bool
    errors: list["ProblemItem"] = Field(default_factory=list)


class DecisionCandidate(WireModel):
    """How one host looked to one request: a score (ms, the less the better) or a refusal."""

    host_id: str
    score_ms: float | None = None
    expected_ttft_ms: float | None = None
    expected_cached_tokens: int | None = None
    running: int | None = None
    refusal: str | None = None


class DecisionView(WireModel):
    """Why one request went to one host; `ttft_ms` and `cached_tokens` are what came of it."""

    request_id: str
    at: Timestamp
    model: str
    prompt_tokens: int
    host_id: str
    reason: str
    expected_ttft_ms: float
    ttft_ms: float | None = None
    expected_cached_tokens: int
    cached_tokens: int | None = None
    candidates: list[DecisionCandidate] = Field(default_factory=list)


class DecisionList(WireModel):
    """The router's latest decisions, newest first."""

    items: list[DecisionView] = Field(default_factory=list)


class HealthStatus(WireModel):
    """The server's health, in its own words; a 503 answer has this shape too."""

    model_config = ConfigDict(extra="allow")

    status: str
    version: str
    services: dict[str, Any] = Field(default_factory=dict)


class ProblemItem(WireModel):
    """One thing wrong with one place of the body; `loc` is keys and indexes from its root."""

    loc: list[str | int]
    msg: str


class Problem(WireModel):
    """An error body: RFC 9457 problem details with our `code`, `requestId` and `errors`.

    Dump it with `exclude_none=True`: `errors` is there for 422 only.
    """

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str = ""
    code: str
    request_id: str | None = None
    errors: list[ProblemItem] | None = None

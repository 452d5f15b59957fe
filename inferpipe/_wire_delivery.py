"""The JSON around what leaves an execution: signals, webhooks, stream tokens, usage.

Owns the shapes of `/v1/webhooks`, `/v1/deliveries`, `/v1/stream-tokens`, `/v1/usage` and of a
signal's body; `inferpipe.wire` is where both sides import them from. Invariant: a secret is an
optional member, because only the answer that made it holds it.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictInt

from inferpipe._wire_base import Count, RequestModel, Timestamp, WireModel

EventName = Annotated[str, Field(min_length=1, max_length=100)]
Mode = Literal["async", "sync", "stream"]
DeliveryStatus = Literal["pending", "delivered", "failed", "dead"]


class SignalRequest(RequestModel):
    """What a waiting step of the name is told."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    data: Any = None


class WebhookRequest(RequestModel):
    """An endpoint to make. `events` names what it gets, `["*"]` for all; `modes` whose ends."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    events: Annotated[list[EventName], Field(min_length=1, max_length=20)]
    modes: Annotated[list[Mode], Field(min_length=1, max_length=3)] = Field(default=["async"])
    workflow_id: str | None = None
    description: Annotated[str, Field(max_length=500)] | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    enabled: bool = True


class WebhookPatch(RequestModel):
    """What to change of an endpoint; what is left out stays."""

    url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    events: Annotated[list[EventName], Field(min_length=1, max_length=20)] | None = None
    modes: Annotated[list[Mode], Field(min_length=1, max_length=3)] | None = None
    workflow_id: str | None = None
    description: Annotated[str, Field(max_length=500)] | None = None
    headers: dict[str, str] | None = None
    enabled: bool | None = None


class WebhookView(WireModel):
    """An endpoint; `secret` only in the answer that made it.

    `disabled_reason` says why the service disabled it by itself: it answered 410, or failed for
    days. Header values are shown to admin keys alone. Where `is_readable` is false, its secret was
    sealed under another cluster secret: nothing can be signed until it is rotated.
    """

    id: str
    url: str
    events: list[str]
    modes: list[str] = Field(default_factory=list)
    workflow_id: str | None = None
    description: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    enabled: bool = True
    disabled_reason: str | None = None
    is_readable: bool = True
    created_at: Timestamp | None = None
    secret: str | None = None


class WebhookList(WireModel):
    """The endpoints of a workspace."""

    items: list[WebhookView] = Field(default_factory=list)
    next_cursor: str | None = None


class RotateSecretRequest(RequestModel):
    """For how long, in ms, deliveries carry a signature of the old secret too."""

    overlap: Annotated[StrictInt, Field(ge=0)] | None = None


class WebhookSecret(WireModel):
    """The new secret of an endpoint, shown once."""

    secret: str | None = None


class DeliveryAttempt(WireModel):
    """One try: the answer's status and first bytes, or why there was none."""

    at: Timestamp
    status: int | None = None
    latency_ms: float | None = None
    error: str | None = None
    answer: str | None = None


class DeliveryView(WireModel):
    """One event on its way to one endpoint. `failed`: a further try is due; `dead`: none is."""

    id: str
    webhook_id: str
    event_id: str
    event_type: str | None = None
    status: DeliveryStatus
    attempts: list[DeliveryAttempt] = Field(default_factory=list)
    next_attempt_at: Timestamp | None = None
    created_at: Timestamp | None = None


class DeliveryList(WireModel):
    """A page of deliveries, newest first."""

    items: list[DeliveryView] = Field(default_factory=list)
    next_cursor: str | None = None


class ReplayRequest(RequestModel):
    """Which deliveries of an endpoint to send again: by status, by when they were made."""

    status: DeliveryStatus | None = None
    from_: Annotated[Timestamp | None, Field(alias="from")] = None
    to: Timestamp | None = None


class Replayed(WireModel):
    """How many deliveries are sent again; where `is_complete` is false, ask again for the rest."""

    replayed: Count
    is_complete: bool = True


class StreamTokenRequest(RequestModel):
    """A token for one path; `ttl` in seconds."""

    resource: Annotated[str, Field(pattern=r"^/", max_length=1024)]
    ttl: Annotated[StrictInt, Field(gt=0)] | None = None


class StreamTokenView(WireModel):
    """A token for `?token=`, for browsers, which cannot send a header with an `EventSource`.

    A repeat under the same Idempotency-Key has `secret_shown` in the token's place.
    """

    token: str | None = None
    expires_at: Timestamp
    secret_shown: bool | None = None


class UsageItem(WireModel):
    """What one workflow, key or day has used; which of them depends on `groupBy`.

    `cached_tokens` are a part of the prompt's, `wasted_tokens` of the total: attempts that gave no
    result, by reason in `wasted`.
    """

    model_config = ConfigDict(extra="allow")

    workflow: str | None = None
    key: str | None = None
    day: str | None = None
    requests: Count = 0
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    completion_tokens: Count = 0
    total_tokens: Count = 0
    wasted_tokens: Count = 0
    wasted: dict[str, Count] = Field(default_factory=dict)


class UsageReport(WireModel):
    """Tokens of the workspace from one UTC day to another, both included."""

    from_: Annotated[str | None, Field(alias="from")] = None
    to: str | None = None
    items: list[UsageItem] = Field(default_factory=list)
    totals: UsageItem = Field(default_factory=UsageItem)

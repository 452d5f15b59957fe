"""The JSON around direct inference: hosts and sessions.

Owns the shapes of `/v1/hosts` and `/v1/sessions`; `inferpipe.wire` is where both sides import them
from.
"""

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from inferpipe._wire_base import Count, RequestModel, Timestamp, WireModel

ModelId = Annotated[str, Field(min_length=1, max_length=256)]
Stake = Annotated[str, Field(pattern=r"^[0-9]{1,30}(\.[0-9]{1,30})?$")]


class HostView(WireModel):
    """A model replica, as its clients see it.

    Args:
        api_url: absolute, `ws://` or `wss://`; `/v1/ws` behind it is its socket.
        stake: a decimal number, the operator's.
        status: `ready` takes requests; `starting`, `draining`, `failed` and `lost` do not.
        latency_ms: time to the first token lately; null: not measured yet.
        load: requests in its engine.
        queued_tokens: prompt and expected completion tokens not yet done.
        kv_usage: used part of its KV cache, 0 to 1.
    """

    id: str
    api_url: str
    models: list[str]
    region: str
    stake: str
    status: str
    latency_ms: float | None = None
    load: Count
    queued_tokens: Count
    kv_usage: float


class HostList(WireModel):
    """Every model replica that has been heard of lately, ready ones first."""

    hosts: list[HostView] = Field(default_factory=list)


class HostRequirements(RequestModel):
    """What a host must serve and satisfy; `region` is a wish, the others are conditions."""

    model: ModelId
    min_stake: Stake | None = None
    max_latency: Annotated[StrictInt, Field(ge=1, le=86_400_000)] | None = None
    region: Annotated[str, Field(max_length=128)] | None = None


class SessionRequest(RequestModel):
    """A session to begin."""

    model: ModelId
    system: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None


class SessionView(WireModel):
    """A session; its messages have a page of their own."""

    id: str
    model: str
    system: str | None = None
    message_count: Count
    created_at: Timestamp
    last_used_at: Timestamp
    expires_at: Timestamp


class SessionMessageView(WireModel):
    """One message, as it was said."""

    role: Literal["system", "user", "assistant"]
    content: str
    created_at: Timestamp


class SessionMessageList(WireModel):
    """A page of messages, the system's first, then as they were said."""

    items: list[SessionMessageView] = Field(default_factory=list)
    next_cursor: str | None = None

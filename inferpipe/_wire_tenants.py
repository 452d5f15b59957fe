"""The JSON of who may call: keys, their limits, workspaces.

Owns the shapes of `/v1/keys` and `/v1/workspaces`; `inferpipe.wire` is where both sides import them
from. Invariant: a secret is an optional member, because only the answer that made it holds it.
"""

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from inferpipe._wire_base import RequestModel, Timestamp, WireModel

LIMIT_MAX = 10**12  # far beyond any window, and exact in every JSON reader


class RateLimit(RequestModel):
    """So many requests in any one window; a window is in ms, or text such as "60s"."""

    requests: Annotated[StrictInt, Field(ge=1, le=LIMIT_MAX)]
    window: Annotated[StrictInt, Field(ge=1)] | str


class TokenLimit(RequestModel):
    """So many tokens, of prompts and answers, in any one window."""

    tokens: Annotated[StrictInt, Field(ge=1, le=LIMIT_MAX)]
    window: Annotated[StrictInt, Field(ge=1)] | str


class KeyRequest(RequestModel):
    """A key to make; each scope includes those before it: read, execute, admin.

    A `token_limit` that is a number counts in the window of `rate_limit`, or else in a minute.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    scopes: Annotated[list[Literal["read", "execute", "admin"]], Field(min_length=1, max_length=3)]
    expires_at: Timestamp | None = None
    rate_limit: RateLimit | None = None
    token_limit: TokenLimit | Annotated[StrictInt, Field(ge=1, le=LIMIT_MAX)] | None = None


class KeyView(WireModel):
    """A key without the key; `key` is there only in the answer that made it.

    A repeat of that answer, under the same Idempotency-Key, has `secret_shown` in its place.
    """

    id: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: Timestamp
    expires_at: Timestamp | None = None
    rate_limit: RateLimit | None = None
    token_limit: TokenLimit | None = None
    key: str | None = None
    secret_shown: bool | None = None


class KeyList(WireModel):
    """The keys of a workspace, oldest first."""

    items: list[KeyView] = Field(default_factory=list)
    next_cursor: str | None = None


class WorkspaceRequest(RequestModel):
    """A workspace to make."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    name: Annotated[str, Field(max_length=100)] | None = None


class WorkspaceView(WireModel):
    """A workspace; `api_key`, its first admin key, only in the answer that made it."""

    id: str
    name: str | None = None
    created_at: Timestamp | None = None
    api_key: str | None = None
    secret_shown: bool | None = None


class WorkspaceList(WireModel):
    """All workspaces, by id."""

    items: list[WorkspaceView] = Field(default_factory=list)
    next_cursor: str | None = None

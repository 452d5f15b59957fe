"""Webhooks: which ends an endpoint hears of, what it is sent, and how that is signed.

Owns the endpoint's record, the payload and both signature schemes. Knows no queue (`delivery` does)
and no HTTP. Invariant: an event's id and a delivery's id are derived, so that whoever makes them
again makes the same; the payload of an event is the same bytes at every endpoint and on every try.
"""

import base64
import hashlib
import hmac
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType

from serve_app.core.errors import InvalidRequestError, Problem
from serve_app.core.execution import Execution, Status
from serve_app.core.inference import JsonValue

EVENT_OF: Mapping[Status, str] = MappingProxyType(
    {
        Status.COMPLETED: "workflow.completed",
        Status.FAILED: "workflow.failed",
        Status.CANCELLED: "workflow.cancelled",
    }
)
EVENT_NAMES = frozenset(EVENT_OF.values())
ALL_EVENTS = "*"
TEST_EVENT = "webhook.test"

SECRET_PREFIX = "whsec_"  # noqa: S105 - the prefix of the Standard Webhooks specification
OVERLAP_DEFAULT_MS = 24 * 3600 * 1000
OVERLAP_MAX_MS = 30 * OVERLAP_DEFAULT_MS
HEADERS_MAX = 20
HEADER_NAME_MAX = 100
HEADER_VALUE_MAX = 1024
_ID_PREFIX = "whk_"
_DELIVERY_PREFIX = "dlv_"
_TOKEN_CHARACTERS = frozenset(
    "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"  # RFC 9110, section 5.6.2
)
# Of the connection, of the message's framing, or ours.
_RESERVED_HEADERS = frozenset(
    {
        "accept-encoding", "connection", "content-encoding", "content-length", "content-type",
        "cookie", "expect", "host", "keep-alive", "proxy-authenticate", "proxy-authorization",
        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "user-agent",
    }
)  # fmt: skip
_RESERVED_PREFIXES = ("x-inferpipe-", "webhook-")


@dataclass(frozen=True, slots=True)
class Secret:
    """A signing secret, `whsec_` and base64; an old one ends with its overlap."""

    value: str
    expires_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Webhook:
    """One endpoint of a workspace, as it is kept.

    Args:
        events: of `EVENT_NAMES`, or `ALL_EVENTS` alone.
        modes: how the executions were started whose ends it hears of: async, sync, stream.
        sealed: its secrets and headers, encrypted (`WebhookSecrets`).
        disabled_reason: why *we* disabled it; None when its owner did, or it is enabled.
        revision: grows with each change, so that two changes at once are seen.
    """

    id: str
    workspace: str
    url: str
    events: tuple[str, ...]
    modes: tuple[str, ...]
    created_at_ms: int
    sealed: str
    workflow_id: str | None = None
    description: str | None = None
    enabled: bool = True
    disabled_reason: str | None = None
    revision: int = 1

    def hears(self, execution: Execution) -> bool:
        """Whether the end of this execution goes to this endpoint."""
        created = execution.created
        return (
            self.enabled
            and created.mode in self.modes
            and self.workflow_id in (None, created.workflow_id)
            and (ALL_EVENTS in self.events or EVENT_OF[execution.status] in self.events)
        )


@dataclass(frozen=True, slots=True)
class WebhookSecrets:
    """What of an endpoint is never stored in the clear: the present secret first.

    None of it is there where it could not be read (`UNREADABLE`).
    """

    secrets: tuple[Secret, ...]
    headers: Mapping[str, str] = field(default_factory=dict)

    def live(self, now_ms: int) -> tuple[str, ...]:
        """Those that sign now: the present one, then the old one while its overlap lasts."""
        return tuple(
            secret.value
            for secret in self.secrets
            if secret.expires_at_ms is None or now_ms < secret.expires_at_ms
        )

    def rotated(self, value: str, now_ms: int, overlap_ms: int) -> "WebhookSecrets":
        """With a new secret; the present one signs on for the overlap, an older one ends."""
        if not self.secrets:
            return replace(self, secrets=(Secret(value),))
        old = replace(self.secrets[0], expires_at_ms=now_ms + overlap_ms)
        return replace(self, secrets=(Secret(value), old) if overlap_ms else (Secret(value),))


UNREADABLE = WebhookSecrets(())


def webhook_id(partition: int, token: str) -> str:
    """An id that names the partition of its queue (two hex digits)."""
    return f"{_ID_PREFIX}{partition:02x}{token}"


def event_id(execution_id: str) -> str:
    """The id of the event that an execution ended; it ends once."""
    return f"evt_{execution_id.removeprefix('exe_')}"


def delivery_id(a_webhook_id: str, an_event_id: str) -> str:
    """The id of an event's way to an endpoint, in the endpoint's partition."""
    digest = hashlib.sha256(f"{a_webhook_id}\0{an_event_id}".encode()).hexdigest()
    return f"{_DELIVERY_PREFIX}{a_webhook_id[len(_ID_PREFIX) :][:2]}{digest[:30]}"


def queue_partition(an_id: str, partition_count: int) -> int | None:
    """The partition that a webhook's or a delivery's id names; None when it is neither."""
    digits = an_id[len(_ID_PREFIX) :][:2]
    is_ours = an_id.startswith((_ID_PREFIX, _DELIVERY_PREFIX)) and len(digits) == 2  # noqa: PLR2004 - as written above
    if not is_ours or not all(c in "0123456789abcdef" for c in digits):
        return None
    partition = int(digits, 16)
    return partition if partition < partition_count else None


def new_secret(*tokens: str) -> str:
    """A secret around random tokens of 128 bits each; two of them make 256."""
    raw = b"".join(base64.urlsafe_b64decode(f"{token}==") for token in tokens)
    return SECRET_PREFIX + base64.b64encode(raw).decode()


def check_events(events: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        InvalidRequestError: one is not known.
    """
    known = ", ".join(sorted(EVENT_NAMES))
    problems = [
        Problem(("body", "events", index), f"{name[:100]!r} is no event; one of {known}, or *")
        for index, name in enumerate(events)
        if name not in EVENT_NAMES and name != ALL_EVENTS
    ]
    if problems:
        raise InvalidRequestError("an event is not known", problems)
    return tuple(dict.fromkeys(events))


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that an endpoint may be sent beside ours, by lower-case name.

    Raises:
        InvalidRequestError: too many, too long, reserved, or not to be put in a header.
    """
    problems = [
        Problem(("body", "headers", name[:HEADER_NAME_MAX]), reason)
        for name, value in headers.items()
        if (reason := _header_problem(name.lower(), value)) is not None
    ]
    if len(headers) > HEADERS_MAX:
        problems.insert(0, Problem(("body", "headers"), f"at most {HEADERS_MAX}"))
    if problems:
        raise InvalidRequestError("a header cannot be sent", problems)
    return {name.lower(): value for name, value in headers.items()}


def end_data(execution: Execution, output: JsonValue, metadata: JsonValue) -> dict[str, JsonValue]:
    """`data` of the event that an execution ended."""
    usage = execution.usage
    return {
        "executionId": execution.id,
        "workflowId": execution.created.workflow_id,
        "output": output,
        "error": execution.error,
        "metadata": metadata,
        "usage": {
            "promptTokens": usage.prompt_tokens,
            "completionTokens": usage.completion_tokens,
            "totalTokens": usage.total_tokens,
        },
    }


def event(an_event_id: str, kind: str, at_ms: int, data: JsonValue) -> dict[str, JsonValue]:
    """The body of a delivery."""
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    created_at = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"id": an_event_id, "type": kind, "createdAt": created_at, "data": data}


def signed_headers(
    an_event_id: str, body: bytes, secrets: Collection[str], now_ms: int
) -> dict[str, str]:
    """The headers that prove where a delivery comes from, in both schemes.

    The Standard Webhooks header carries a signature of every live secret; that of the usage guide
    holds one alone, so during an overlap it keeps to the old secret, which is the last.

    `secrets` are those that sign now, the present one first; there is one at least.
    """
    seconds = str(now_ms // 1000)
    signed = b".".join((an_event_id.encode(), seconds.encode(), body))
    signatures = [
        "v1," + base64.b64encode(_hmac(_key_of(secret), signed).digest()).decode()
        for secret in secrets
    ]
    *_, oldest = secrets
    return {
        "webhook-id": an_event_id,
        "webhook-timestamp": seconds,
        "webhook-signature": " ".join(signatures),
        "x-inferpipe-signature": _hmac(oldest.encode(), body).hexdigest(),
    }


def _key_of(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX))


def _hmac(key: bytes, message: bytes) -> "hmac.HMAC":
    return hmac.new(key, message, hashlib.sha256)


def _header_problem(name: str, value: str) -> str | None:
    if not 0 < len(name) <= HEADER_NAME_MAX or not _TOKEN_CHARACTERS.issuperset(name):
        return "this is no header name"
    if name in _RESERVED_HEADERS or name.startswith(_RESERVED_PREFIXES):
        return "this header is set by the service"
    if len(value) > HEADER_VALUE_MAX:
        return f"its value has more than {HEADER_VALUE_MAX} characters"
    if value != value.strip() or not all(" " <= c <= "~" for c in value):
        return "its value holds what is not printable ASCII"
    return None

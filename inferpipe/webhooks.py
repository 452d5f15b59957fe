"""Check that a webhook delivery comes from your inferpipe server, and read it.

Owns the receiver's side of both signature schemes (docs/webhooks.md). Invariant: whatever an
attacker sends, the answer is an event that was signed, or `WebhookVerificationError`; signatures
are compared in constant time. The same event may come twice: `WebhookEvent.id` tells.
"""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError

from inferpipe._wire_base import Timestamp, WireModel
from inferpipe.errors import InvalidArgumentError, WebhookVerificationError

__all__ = ["TOLERANCE_S", "WebhookEvent", "sign", "verify"]

TOLERANCE_S = 300.0  # of the Standard Webhooks libraries: clocks differ, replays come later
_SIGNATURES_MAX = 32  # in one header; a rotation has two
_TIMESTAMP_DIGITS_MAX = 12
_PREFIX = "whsec_"


class WebhookEvent(WireModel):
    """One event. Its `id` is the same on every try and at every endpoint: remember it."""

    id: str
    type: str
    created_at: Timestamp
    data: dict[str, Any] = Field(default_factory=dict)


def verify(
    payload: bytes | str,
    headers: Mapping[str, Any],
    secret: str | Sequence[str],
    *,
    scheme: Literal["standard", "body"] = "standard",
    tolerance_s: float = TOLERANCE_S,
    now: float | None = None,
) -> WebhookEvent:
    """Check a delivery and return its event.

    Args:
        payload: the raw body, as it came; parsed and written again it is another one.
        headers: of the request, names in any case.
        secret: the webhook's (`whsec_…`), or several while you change from one to another.
        scheme: `standard` checks `webhook-signature` over id, time and body. `body` checks
            `x-inferpipe-signature`, which says nothing of the time, so that a delivery somebody
            has recorded passes for ever.
        tolerance_s: how far the signed time may be from ours, past and future.
        now: Unix seconds; by default this machine's clock.

    Raises:
        WebhookVerificationError: the delivery is not to be trusted; the message says why.
        InvalidArgumentError: a secret is none.
    """
    secrets = [secret] if isinstance(secret, str) else list(secret)
    keys = [_key_of(one) for one in secrets]
    if not keys:
        raise InvalidArgumentError("no secret was given")
    body = _bytes_of(payload)
    given = _lowered(headers)
    if scheme == "body":
        _check_body(body, given, secrets)
        return _event_of(body, None)
    an_id = _header(given, "webhook-id")
    timestamp = _header(given, "webhook-timestamp")
    _check_time(timestamp, time.time() if now is None else now, tolerance_s)
    signatures = _header(given, "webhook-signature").split(" ")
    if len(signatures) > _SIGNATURES_MAX:
        _refuse("webhook-signature holds too many signatures")
    signed = b".".join((an_id.encode(), timestamp.encode(), body))
    expected = [_digest(key, signed) for key in keys]
    # All are compared, so that the time taken does not say which one it was.
    matches = [
        hmac.compare_digest(_decoded(text), digest) for text in signatures for digest in expected
    ]
    if not any(matches):
        _refuse("no signature of webhook-signature fits the body, the id and the time")
    return _event_of(body, an_id)


def sign(payload: bytes | str, secret: str, *, event_id: str, at: float) -> dict[str, str]:
    """The headers of a delivery, for tests of your receiver.

    Args:
        payload: the body to sign.
        secret: `whsec_…`.
        event_id: what `webhook-id` shall be; the body's `id` too.
        at: Unix seconds.
    """
    body = _bytes_of(payload)
    timestamp = str(int(at))
    digest = _digest(_key_of(secret), b".".join((event_id.encode(), timestamp.encode(), body)))
    return {
        "webhook-id": event_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
        "x-inferpipe-signature": _digest(secret.encode(), body).hex(),
    }


def _check_body(body: bytes, given: Mapping[str, str], secrets: Sequence[str]) -> None:
    text = _header(given, "x-inferpipe-signature")
    try:
        sent = bytes.fromhex(text)
    except ValueError:
        _refuse("x-inferpipe-signature is not hexadecimal")
    matches = [hmac.compare_digest(sent, _digest(secret.encode(), body)) for secret in secrets]
    if not any(matches):
        _refuse("x-inferpipe-signature does not fit the body")


def _check_time(timestamp: str, now: float, tolerance_s: float) -> None:
    if not (timestamp.isascii() and timestamp.isdigit()) or len(timestamp) > _TIMESTAMP_DIGITS_MAX:
        _refuse("webhook-timestamp is no number of seconds")
    age_s = now - int(timestamp)
    if age_s > tolerance_s:
        _refuse(f"webhook-timestamp is {age_s:.0f} s old; at most {tolerance_s:g} s are taken")
    if -age_s > tolerance_s:
        _refuse(f"webhook-timestamp is {-age_s:.0f} s ahead: compare the clocks")


def _decoded(signature: str) -> bytes:
    """The bytes of one `v1,<base64>`; of anything else bytes that fit nothing."""
    version, _, text = signature.partition(",")
    if version != "v1":
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _key_of(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgumentError("the secret is not whsec_ and base64") from error
    if not secret.startswith(_PREFIX) or not key:
        raise InvalidArgumentError("the secret is not whsec_ and base64")
    return key


def _bytes_of(payload: bytes | str) -> bytes:
    try:
        return payload.encode() if isinstance(payload, str) else bytes(payload)
    except UnicodeEncodeError:
        _refuse("the body is no UTF-8 text")


def _lowered(headers: Mapping[str, Any]) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _header(given: Mapping[str, str], name: str) -> str:
    value = given.get(name, "")
    if not value:
        _refuse(f"the header {name} is missing")
    if not value.isascii():
        _refuse(f"the header {name} is not ASCII")
    return value


def _event_of(body: bytes, signed_id: str | None) -> WebhookEvent:
    try:
        event = WebhookEvent.model_validate(json.loads(body))
    except (ValueError, ValidationError, RecursionError) as error:
        raise WebhookVerificationError("the body is signed, but is no event") from error
    if signed_id is not None and event.id != signed_id:
        _refuse("webhook-id is not the id in the body")
    return event


def _digest(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, hashlib.sha256)


def _refuse(reason: str) -> NoReturn:
    raise WebhookVerificationError(reason)

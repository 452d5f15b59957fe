"""Webhooks that come in: whose they are, and whether their signature is right and new.

Owns the two schemes, their names and the secrets' form. Knows no HTTP and no store. Invariant: what
tells a repeat is signed: the id of Standard Webhooks, or for GitHub's scheme, which signs the body
alone, the body itself; so nobody who only listened can start anything again.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from serve_app.core.app_events import HOOK_PREFIX, derived_event_id
from serve_app.core.errors import InvalidRequestError, Problem, UnauthorizedError
from serve_app.core.triggers import HookScheme
from serve_app.core.webhooks import SECRET_PREFIX, Secret

SECRET_MIN, SECRET_MAX = 16, 256
_ID_MAX = 256
_SIGNATURES_MAX = 10  # a sender that rotates has two
_REFUSED = "there is no such hook, or its signature is wrong or too old"


@dataclass(frozen=True, slots=True)
class HookSecrets:
    """What a workflow's hook is verified with: the present secret first."""

    secrets: tuple[Secret, ...]

    def live(self, now_ms: int) -> tuple[str, ...]:
        """Those that count now."""
        return tuple(
            one.value
            for one in self.secrets
            if one.expires_at_ms is None or now_ms < one.expires_at_ms
        )

    def rotated(self, value: str, now_ms: int, overlap_ms: int) -> "HookSecrets":
        """With a new secret; the present one counts on for the overlap, an older one ends."""
        old = tuple(Secret(one.value, now_ms + overlap_ms) for one in self.secrets[:1])
        return HookSecrets((Secret(value), *(old if overlap_ms else ())))


def hook_event_name(workflow_id: str) -> str:
    """The event that a workflow's hook becomes; nobody else can send it."""
    return HOOK_PREFIX + workflow_id


def refused() -> UnauthorizedError:
    """The same for all that is wrong with a delivery: what there is, is not told."""
    return UnauthorizedError(_REFUSED)


def check_secret(value: str) -> str:
    """A secret that somebody else made.

    Raises:
        InvalidRequestError: too short or long, not printable, or `whsec_` without base64 behind it.
    """
    problem = None
    if not (SECRET_MIN <= len(value) <= SECRET_MAX and value.isascii() and value.isprintable()):
        problem = f"is {SECRET_MIN} to {SECRET_MAX} printable ASCII characters"
    elif value.startswith(SECRET_PREFIX) and not _key_of(value):
        problem = f"has no base64 behind {SECRET_PREFIX}"
    if problem is not None:
        raise InvalidRequestError("this is no secret", [Problem(("body", "secret"), problem)])
    return value


def verified_event_id(
    scheme: HookScheme,
    headers: Mapping[str, str],
    body: bytes,
    secrets: Collection[str],
    times_ms: tuple[int, int],
) -> str:
    """The id of the event that a delivery is; the same for each repeat of it.

    `headers` have lower-case names; `times_ms` are the present and how far from it a delivery's
    own time may be.

    Raises:
        UnauthorizedError: nothing live has signed it, or it is too old or of the future.
    """
    if scheme is HookScheme.GITHUB:
        given = headers.get("x-hub-signature-256", "").removeprefix("sha256=")
        keys = [secret.encode() for secret in secrets]
        if not any(_is_same(_hmac(key, body).hexdigest(), given) for key in keys):
            raise refused()
        return derived_event_id("hook", hashlib.sha256(body).hexdigest())
    an_id, at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    now_ms, tolerance_ms = times_ms
    is_moment = at.isascii() and at.isdecimal() and len(at) <= len(str(now_ms))
    if not (0 < len(an_id) <= _ID_MAX and an_id.isascii() and an_id.isprintable() and is_moment):
        raise refused()
    if abs(int(at) * 1000 - now_ms) > tolerance_ms:
        raise refused()
    signed = b".".join((an_id.encode(), at.encode(), body))
    given_all = headers.get("webhook-signature", "").split(" ")[:_SIGNATURES_MAX]
    for secret in secrets:
        key = _key_of(secret) if secret.startswith(SECRET_PREFIX) else secret.encode()
        wanted = "v1," + base64.b64encode(_hmac(key, signed).digest()).decode()
        if any(_is_same(wanted, given) for given in given_all):
            return derived_event_id("hook", an_id)
    raise refused()


def _is_same(wanted: str, given: str) -> bool:
    return hmac.compare_digest(wanted.encode(), given.encode("utf-8", "surrogateescape"))


def _hmac(key: bytes, message: bytes) -> "hmac.HMAC":
    return hmac.new(key, message, hashlib.sha256)


def _key_of(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return b""

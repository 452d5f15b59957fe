"""Stream tokens: the right to open one stream, for clients that can send no header.

Owns which paths a token can be for, its form and its signature. Reads no clock. Invariants: a token
opens exactly the path that it names, in the workspace and with at most the scope of the key that
asked for it; it is signed, not stored, so it ends by its time alone.
"""

import base64
import hashlib
import hmac
import json
import re
from dataclasses import asdict
from urllib.parse import unquote

from serve_app.core.auth import Principal, Scope
from serve_app.core.errors import InvalidRequestError, Problem
from serve_app.core.limits import read_limits

# Whole paths, and the scope that opening them needs: a socket runs inference, the others read.
_RESOURCES = (
    (re.compile(r"/v1/executions/[^/]+/stream"), Scope.READ),
    (re.compile(r"/stream/(?:workflow|file|user)/[^/]+"), Scope.READ),
    (re.compile(r"/tasks/[^/]+/stream"), Scope.READ),
    (re.compile(r"(?:/hosts/[^/]+)?/v1/ws"), Scope.EXECUTE),
)


def scope_of_resource(resource: str) -> Scope:
    """The scope that a key needs to get a token for a path.

    Raises:
        InvalidRequestError: no token is given for such a path.
    """
    for pattern, scope in _RESOURCES:
        if pattern.fullmatch(resource):
            return scope
    problem = Problem(
        ("body", "resource"),
        "the path of a stream: /v1/executions/{id}/stream, /stream/workflow/{id}, "
        "/stream/file/{id}, /stream/user/{id}, /tasks/{id}/stream, /v1/ws or /hosts/{id}/v1/ws",
    )
    raise InvalidRequestError("there are no stream tokens for this path", [problem])


def seal(secret: bytes, principal: Principal, resource: str, expires_at_ms: int) -> str:
    """A token: URL-safe text.

    Args:
        secret: the cluster secret.
        principal: who may open the stream, with the scope the token shall carry.
        resource: the path, percent-encoded or not.
        expires_at_ms: Unix epoch.
    """
    members = [
        principal.workspace,
        principal.scope,
        principal.key_id,
        unquote(resource),
        expires_at_ms,
        asdict(principal.limits),
    ]
    body = _encode(json.dumps(members, separators=(",", ":")).encode())
    return f"{body}.{_signature(secret, body)}"


def unseal(secret: bytes, token: str, path: str, now_ms: int) -> Principal | None:
    """Who a token stands for; None when it is none, is for another path, or is over.

    Args:
        secret: the cluster secret.
        token: hostile text.
        path: of the request, percent-decoded.
        now_ms: Unix epoch.
    """
    body, _, signature = token.partition(".")
    # Bytes, because compare_digest refuses text that is not ASCII.
    expected = _signature(secret, body).encode()
    if not hmac.compare_digest(expected, signature.encode(errors="replace")):
        return None
    workspace, scope, key_id, resource, expires_at_ms, limits = json.loads(_decode(body))
    if resource != path or expires_at_ms <= now_ms:
        return None
    return Principal(workspace, Scope(scope), key_id, read_limits(limits))


def _signature(secret: bytes, body: str) -> str:
    message = b"inferpipe-stream-token-1\n" + body.encode(errors="replace")
    return _encode(hmac.new(secret, message, hashlib.sha256).digest())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

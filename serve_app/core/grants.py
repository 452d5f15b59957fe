"""The right to run one request on one replica: signing it, checking it, spending it once.

Owns the signature and the replica's ledger of spent grants. Does not choose replicas (the router
does) and reads no clock: the time comes in as an argument. Invariant: a grant is spent at most once
by the replica that it names, and the ledger's memory is bounded.
"""

import hashlib
import hmac
import json

from serve_app.core.errors import ConnectionFailedError, ForbiddenError, OverloadedError
from serve_app.core.inference import Grant

LEDGER_SIZE_MAX = 100_000  # unexpired grants remembered; about 20 MB at the most


def sign_grant(
    secret: bytes, request_id: str, endpoint: tuple[str, str, int], expires_at_ms: int
) -> Grant:
    """Return a grant for one request.

    Args:
        secret: the cluster secret.
        request_id: what the grant is for; the replica spends it once.
        endpoint: replica id, host and port.
        expires_at_ms: ms since the Unix epoch.
    """
    replica_id, host, port = endpoint
    signature = _signature(secret, (request_id, replica_id, host, port, expires_at_ms))
    return Grant(request_id, replica_id, host, port, expires_at_ms, signature)


def is_signed(secret: bytes, grant: Grant) -> bool:
    """Whether the signature fits the other members; takes the same time for every answer."""
    members = (
        grant.request_id,
        grant.replica_id,
        grant.host,
        grant.port,
        grant.expires_at_ms,
    )
    # Bytes, because compare_digest refuses text that is not ASCII.
    return hmac.compare_digest(
        _signature(secret, members).encode(), grant.signature.encode(errors="replace")
    )


class GrantLedger:
    """What one replica remembers of the grants it has spent, until they expire."""

    def __init__(self, secret: bytes, replica_id: str, size_max: int = LEDGER_SIZE_MAX) -> None:
        self._secret = secret
        self._replica_id = replica_id
        self._size_max = size_max
        self._expiry_by_request: dict[str, int] = {}

    def spend(self, grant: Grant, now_ms: int) -> None:
        """Accept the grant, once.

        Raises:
            ForbiddenError: a wrong signature, or the grant was spent before.
            ConnectionFailedError: it has expired or names another replica (one that was replaced
                under the same address, say); the honest remedy is to ask the router again.
            OverloadedError: more unexpired grants than the ledger holds.
        """
        if not is_signed(self._secret, grant):
            raise ForbiddenError("the grant's signature does not fit")
        if grant.replica_id != self._replica_id:
            raise ConnectionFailedError("the grant names another replica")
        if grant.expires_at_ms <= now_ms:
            raise ConnectionFailedError("the grant has expired")
        if grant.request_id in self._expiry_by_request:
            raise ForbiddenError("the grant has been used before")
        if len(self._expiry_by_request) >= self._size_max:
            self._forget_expired(now_ms)
        self._expiry_by_request[grant.request_id] = grant.expires_at_ms

    def _forget_expired(self, now_ms: int) -> None:
        kept = {key: expiry for key, expiry in self._expiry_by_request.items() if expiry > now_ms}
        self._expiry_by_request = kept
        if len(kept) >= self._size_max:
            raise OverloadedError("too many grants are outstanding")


def _signature(secret: bytes, members: tuple[str, str, str, int, int]) -> str:
    # JSON keeps the borders between members, which plain concatenation would lose.
    message = b"inferpipe-grant-1\n" + json.dumps(members).encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()

"""Who asks: keys, scopes and the principal they make.

Owns the order of scopes and the form of a key record. Invariant: a key is known by its hash alone;
the key itself is shown once and kept nowhere.
"""

import hashlib
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from serve_app.core.limits import NO_LIMITS, Limits


class Scope(StrEnum):
    """What a key may do; each includes the one before it."""

    READ = "read"
    EXECUTE = "execute"
    ADMIN = "admin"


KEY_PREFIX = "ip_"
SHOWN_CHARACTERS = 8

_RANK = {Scope.READ: 0, Scope.EXECUTE: 1, Scope.ADMIN: 2}


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: one workspace, one highest scope, the id of the key it used, and its limits."""

    workspace: str
    scope: Scope
    key_id: str
    limits: Limits = NO_LIMITS

    def can(self, scope: Scope) -> bool:
        """Whether its scope includes this one."""
        return _RANK[self.scope] >= _RANK[scope]


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is kept and shown: everything but the key.

    Args:
        prefix: its first characters, for people to tell keys apart.
        expires_at_ms: Unix epoch; None: it does not expire.
    """

    id: str
    workspace: str
    name: str
    scopes: tuple[Scope, ...]
    prefix: str
    created_at_ms: int
    expires_at_ms: int | None = None
    limits: Limits = NO_LIMITS

    def principal(self) -> Principal:
        """Who a caller with this key is."""
        return Principal(self.workspace, highest(self.scopes), self.id, self.limits)


def highest(scopes: Collection[Scope]) -> Scope:
    """The scope that includes all of these."""
    return max(scopes, key=_RANK.__getitem__)


def new_key(token: str) -> str:
    """A key around a token that nobody can guess.

    It begins with a prefix and ends with a checksum (CRC-32, 8 hex digits), so that a scanner can
    tell a leaked key from other text.
    """
    body = f"{KEY_PREFIX}{token}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def key_digest(key: str) -> str:
    """The name a key is stored under: hex SHA-256.

    A plain hash is enough for a random key; a short chosen one is the operator's choice.
    """
    return hashlib.sha256(key.encode()).hexdigest()

"""Who asks: keys, scopes and the principal they make.

Owns the order of scopes and the form of a key record. Invariant: a key is known by its hash alone;
the key itself is shown once and kept nowhere.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key may do; each includes the one before it."""

    READ = "read"
    EXECUTE = "execute"
    ADMIN = "admin"


_RANK = {Scope.READ: 0, Scope.EXECUTE: 1, Scope.ADMIN: 2}


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: one workspace, one highest scope, and the id of the key it used."""

    workspace: str
    scope: Scope
    key_id: str

    def can(self, scope: Scope) -> bool:
        """Whether its scope includes this one."""
        return _RANK[self.scope] >= _RANK[scope]


def key_digest(key: str) -> str:
    """The name a key is stored under: hex SHA-256.

    A plain hash is enough for a random key; a short chosen one is the operator's choice.
    """
    return hashlib.sha256(key.encode()).hexdigest()

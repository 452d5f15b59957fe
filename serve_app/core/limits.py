"""Limits of a key: so many requests, so many tokens, in a window of time.

Owns what a limit is and how a refusal is told. A window begins with the first request after the
last one ended, so an idle key has no window. Tokens are known when they are spent: the call that
crosses the limit is finished, the next one is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_MS_MAX = 31 * 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `count_max` in any one window; both are 1 or more."""

    count_max: int
    window_ms: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use; None: as much as it likes."""

    requests: Limit | None = None
    tokens: Limit | None = None


NO_LIMITS = Limits()


def read_limits(members: Mapping[str, Mapping[str, int] | None]) -> Limits:
    """Limits from their JSON form, which is `dataclasses.asdict`'s."""
    found = {kind: Limit(**limit) for kind, limit in members.items() if limit is not None}
    return Limits(**found)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a caller stands after a request, by the limit that binds it.

    Args:
        kind: "requests" or "tokens".
        count_max: the limit.
        remaining: of it, in this window.
        reset_ms: until the window ends.
    """

    is_allowed: bool
    kind: str
    count_max: int
    remaining: int
    reset_ms: int

    @property
    def reset_s(self) -> int:
        """Whole seconds until the window ends; waiting so long is enough."""
        return -(-self.reset_ms // 1000)

"""The limit check that stands before any work.

Owns the default limit and a brief memory of what keys have spent. Invariant: a caller without a
limit costs no call to the store.
"""

from dataclasses import replace

from serve_app.core.auth import Principal
from serve_app.core.errors import RateLimitExceededError
from serve_app.core.limits import Limits, Standing
from serve_app.ports import Clock, LimitStore, UsageLedger

SPENT_BELIEVED_S = 1.0  # what a key has spent is asked of every partition; once a second is enough
_SPENT_KEPT_MAX = 10_000


class KeyLimits:
    """Counts requests, and compares tokens spent."""

    def __init__(
        self, store: LimitStore, usage: UsageLedger, clock: Clock, default: Limits
    ) -> None:
        self._store = store
        self._usage = usage
        self._clock = clock
        self._default = default
        self._spent: dict[tuple[str, str], tuple[float, int]] = {}

    async def check(self, principal: Principal) -> Standing | None:
        """Count one request; where the caller stands, or None where nothing limits it.

        Raises:
            RateLimitExceededError: it stands over a limit; the error says for how long.
        """
        limits = self._limits_of(principal)
        if limits.requests is None and limits.tokens is None:
            return None
        spent = 0 if limits.tokens is None else await self._spent_tokens(principal)
        standing = await self._store.take(principal.workspace, principal.key_id, limits, spent)
        if not standing.is_allowed:
            raise RateLimitExceededError(
                f"this key's limit of {standing.count_max} {standing.kind} is used up; "
                f"it is renewed in {standing.reset_s} s",
                standing,
            )
        return standing

    def _limits_of(self, principal: Principal) -> Limits:
        limits = principal.limits
        return replace(limits, requests=limits.requests or self._default.requests)

    async def _spent_tokens(self, principal: Principal) -> int:
        name, now_s = (principal.workspace, principal.key_id), self._clock.monotonic_s()
        known = self._spent.get(name)
        if known is not None and now_s - known[0] < SPENT_BELIEVED_S:
            return known[1]
        spent = await self._usage.spent_tokens(*name)
        if len(self._spent) >= _SPENT_KEPT_MAX:
            self._spent.clear()
        self._spent[name] = (now_s, spent)
        return spent

"""First answers in Redis, for repeats under the same Idempotency-Key.

Owns the names of the stored answers. Invariant: a claim is one function call, so of two requests
at once only one is told to do the work.
"""

import hashlib

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import CONFIG_KEY
from serve_app.ports import Claim, ClaimState

_HOLD_MS = 60_000  # far longer than any creation; after a crash the next repeat does the work
_KEPT_MS = 24 * 3600 * 1000


class RedisIdempotency:
    """See `ports.Idempotency`."""

    def __init__(self, calls: RedisCalls) -> None:
        self._calls = calls

    async def begin(self, scope: tuple[str, ...], body_hash: str, claim_id: str) -> Claim:
        """See `ports.Idempotency`."""
        answer = await self._calls.fcall(
            "ip1_once_begin", CONFIG_KEY, _name(scope), body_hash, claim_id, _HOLD_MS
        )
        state = ClaimState(answer[0].decode())
        return Claim(state, answer[1] if state is ClaimState.DONE else None)

    async def finish(self, scope: tuple[str, ...], claim_id: str, answer: bytes) -> None:
        """See `ports.Idempotency`."""
        await self._calls.fcall(
            "ip1_once_finish", CONFIG_KEY, _name(scope), claim_id, answer, _KEPT_MS
        )

    async def drop(self, scope: tuple[str, ...], claim_id: str) -> None:
        """See `ports.Idempotency`."""
        await self._calls.fcall("ip1_once_drop", CONFIG_KEY, _name(scope), claim_id)


def _name(scope: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(scope).encode()).hexdigest()

"""LimitStore on Redis: one small hash per limited key, one function call per request.

Owns the form of that call. A call that is sent again after a lost answer counts twice: that errs
on the safe side and harms nobody for longer than a window.
"""

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import CONFIG_KEY
from serve_app.core.limits import Limit, Limits, Standing


class RedisLimits:
    """See `ports.LimitStore`."""

    def __init__(self, calls: RedisCalls) -> None:
        self._calls = calls

    async def take(
        self, workspace: str, key_id: str, limits: Limits, spent_tokens: int
    ) -> Standing:
        """See `ports.LimitStore`."""
        allowed, kind, count_max, remaining, reset_ms = await self._calls.fcall(
            "ip1_take",
            CONFIG_KEY,
            f"{workspace}:{key_id}",
            *_pair(limits.requests),
            *_pair(limits.tokens),
            spent_tokens,
        )
        return Standing(
            bool(allowed), kind.decode(), int(count_max), max(0, int(remaining)), int(reset_ms)
        )


def _pair(limit: Limit | None) -> tuple[int, int]:
    return (0, 0) if limit is None else (limit.count_max, limit.window_ms)

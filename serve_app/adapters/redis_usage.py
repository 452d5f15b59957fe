"""UsageLedger on Redis: one hash per partition, workspace and day, added up by the reader.

Owns the names of the counters. Invariant: an entry is counted inside the function call that makes
it a fact, so it is counted once however often that call is sent.
"""

import asyncio
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date, timedelta

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.core.inference import Usage
from serve_app.core.usage import Spending, UsageRow

_DAYS_AT_ONCE = 32  # bounds the calls of one report that wait together
_BORDER = "\x1f"  # between the parts of a counter's name; in no id
_WASTED = "w:"


class RedisUsage:
    """See `ports.UsageLedger`."""

    def __init__(self, calls: RedisCalls, *, partition_count: int, kept_ms: int) -> None:
        self._calls = calls
        self._partition_count = partition_count
        self._kept_ms = kept_ms

    async def add(self, spending: Spending) -> None:
        """See `ports.UsageLedger`."""
        key = f"ip:{{{zlib.crc32(spending.id.encode()) % self._partition_count}}}"
        args = booking_args(spending, self._kept_ms)
        await self._calls.fcall("ip1_spend", key, spending.id, spending.workspace, *args)

    async def rows(self, workspace: str, first: date, last: date) -> Sequence[UsageRow]:
        """See `ports.UsageLedger`."""
        rows: list[UsageRow] = []
        days = [first + timedelta(days=i) for i in range((last - first).days + 1)]
        for at in range(0, len(days), _DAYS_AT_ONCE):
            pages = await asyncio.gather(
                *(
                    self._day(workspace, day.isoformat(), partition)
                    for day in days[at : at + _DAYS_AT_ONCE]
                    for partition in range(self._partition_count)
                )
            )
            rows += [row for page in pages for row in page]
        return rows

    async def spent_tokens(self, workspace: str, key_id: str) -> int:
        """See `ports.UsageLedger`."""
        counts = await asyncio.gather(
            *(
                self._calls.call("HGET", f"ip:{{{partition}}}:spent:{workspace}", key_id)
                for partition in range(self._partition_count)
            )
        )
        return sum(int(count or 0) for count in counts)

    async def _day(self, workspace: str, day: str, partition: int) -> list[UsageRow]:
        counters = await self._calls.call("HGETALL", f"ip:{{{partition}}}:use:{workspace}:{day}")
        counts: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for name, count in counters.items():
            workflow_id, key_id, metric = name.decode().split(_BORDER)
            counts[workflow_id, key_id][metric] = int(count)
        return [_row(day, *names, of) for names, of in counts.items()]


def booking_args(spending: Spending, kept_ms: int) -> tuple[str | int, ...]:
    """The last arguments of the functions that count an entry, in the order of `book` there."""
    usage = spending.usage
    return (
        spending.day,
        kept_ms,
        f"{spending.workflow_id}{_BORDER}{spending.key_id}{_BORDER}",
        spending.key_id,
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
        _WASTED + (spending.waste or ""),
        spending.wasted_tokens,
    )


def _row(day: str, workflow_id: str, key_id: str, counts: Mapping[str, int]) -> UsageRow:
    wasted = {
        name.removeprefix(_WASTED): count
        for name, count in counts.items()
        if name.startswith(_WASTED)
    }
    usage = Usage(counts.get("prompt", 0), counts.get("completion", 0), counts.get("cached", 0))
    return UsageRow(day, workflow_id, key_id, counts.get("requests", 0), usage, wasted)

"""Schedules with cronsim: which moments a cron text means on a clock in a time zone.

Owns the check of the text and the way between moments and Unix ms. cronsim follows Debian's cron
where clocks change: a job at a fixed time that a skipped hour holds runs right after it, one that a
repeated hour holds runs once, and what runs every hour or every few minutes goes by elapsed time.
Invariant: what `check` accepts has a next moment from now on, for as long as the calendar goes.
"""

import zoneinfo
from datetime import UTC, datetime
from functools import lru_cache

from cronsim import CronSim, CronSimError

TEXT_MAX = 100
FIELDS = 5
_PROBE = datetime(2026, 1, 1, tzinfo=UTC)
_BEHIND_MAX = 5  # moments before `after` that a repeated hour may give first
# The library asserts, indexes and converts before it has looked at everything.
_FAILURES = (CronSimError, ValueError, ArithmeticError, LookupError, AssertionError)


class CronSchedules:
    """Cron in five fields."""

    def check(self, cron: str, timezone: str) -> tuple[str, str] | None:
        """See `event_ports.Schedules`."""
        if timezone not in _zones():
            return "timezone", f"{timezone[:TEXT_MAX]!r} is no time zone, such as Europe/Berlin"
        if len(cron) > TEXT_MAX or not cron.isascii() or len(cron.split()) != FIELDS:
            return "cron", "has five fields: minute, hour, day of month, month, day of week"
        try:
            next(CronSim(cron, _PROBE))
        except StopIteration:
            return "cron", "means no day that ever comes"
        except _FAILURES as error:
            return "cron", f"is no cron text: {error}"
        return None

    def next_ms(self, cron: str, timezone: str, after_ms: int) -> int | None:
        """See `event_ports.Schedules`."""
        after = datetime.fromtimestamp(after_ms // 1000, zoneinfo.ZoneInfo(timezone))
        moments = CronSim(cron, after)
        for _ in range(_BEHIND_MAX):
            try:
                moment_ms = round(next(moments).timestamp() * 1000)
            except StopIteration:
                return None
            # In the second turn of a repeated hour the library counts from the first.
            if moment_ms > after_ms:
                return moment_ms
        return None


@lru_cache(maxsize=1)
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())

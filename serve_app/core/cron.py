"""Which due times of a workflow's clocks are to be started now.

Owns catching up: what is done about moments that passed while nobody kept time. Reads no clock and
knows no calendar: the present and the schedule come in as arguments. Invariant: what is looked at
is bounded, however long nobody kept time, and no due time is before what was dealt with already.
"""

from collections.abc import Callable, Iterable, Iterator

from serve_app.core.triggers import CatchUp, CronTrigger, Trigger

LATE_MS = 60_000  # a due time that is no older was not missed, it is being started
CATCH_UP_MAX = 100  # due times of one trigger started at once; older ones are left out
CLOCK_BACK_MS = 3_600_000  # the store's clock went back by more: what was written down is wrong
_FIRST_LOOK_MS = 3_600_000

NextMs = Callable[[str, str, int], int | None]


def due_times(
    triggers: Iterable[Trigger], after_ms: int, now_ms: int, next_ms: NextMs
) -> tuple[dict[int, CronTrigger], int | None]:
    """The due times after one moment and up to another, and the next one after both.

    Returns:
        What to start: each due time once, with a trigger that has it, oldest first; and when to
        look again, None: never.
    """
    found: dict[int, CronTrigger] = {}
    coming: list[int] = []
    for trigger in _clocks(triggers):
        for at_ms in _missed(trigger, after_ms, now_ms, next_ms):
            found.setdefault(at_ms, trigger)
        following = next_ms(trigger.cron, trigger.timezone, max(after_ms, now_ms))
        coming += [] if following is None else [following]
    return dict(sorted(found.items())), min(coming, default=None)


def _clocks(triggers: Iterable[Trigger]) -> Iterator[CronTrigger]:
    return (trigger for trigger in triggers if isinstance(trigger, CronTrigger))


def _missed(trigger: CronTrigger, after_ms: int, now_ms: int, next_ms: NextMs) -> list[int]:
    """The newest due times in a span, as many as the policy takes.

    The look goes back in spans that double, so that its cost follows what is taken and not how
    long nobody looked.
    """
    if trigger.catch_up is CatchUp.SKIP:
        after_ms = max(after_ms, now_ms - LATE_MS)
    count_max = 1 if trigger.catch_up is CatchUp.LATEST else CATCH_UP_MAX
    look_ms = _FIRST_LOOK_MS
    while after_ms < now_ms:
        start_ms = max(after_ms, now_ms - look_ms)
        found = []
        at_ms = next_ms(trigger.cron, trigger.timezone, start_ms)
        while at_ms is not None and at_ms <= now_ms:
            found.append(at_ms)
            at_ms = next_ms(trigger.cron, trigger.timezone, at_ms)
        if len(found) >= count_max or start_ms == after_ms:
            return found[-count_max:]
        look_ms *= 2
    return []

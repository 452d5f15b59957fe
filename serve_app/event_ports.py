"""The outside world of triggers: where events live, and clocks.

Owns the protocols only, as `ports` does for the rest. Invariant: a port speaks core's values, never
a library's.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.core.app_events import AppEvent
from serve_app.core.subscriptions import Subscriber


class EventStore(Protocol):
    """Events by topic, durable when a call returns. Every call may be repeated without harm."""

    async def publish(self, event: AppEvent, waiting_max: int) -> bool:
        """Accept an event; whether it is new there, by its id, within a day.

        Raises:
            OverloadedError: `waiting_max` messages of its partition wait to be carried out.
        """
        ...

    def subscribers(
        self, workspace: str, name: str, since_max_ms: int
    ) -> AsyncIterator[Sequence[Subscriber]]:
        """Who waited for a topic's events at a moment and still does, in pages, perhaps twice."""
        ...

    async def forget(self, workspace: str, name: str, who: Subscriber) -> None:
        """Drop a subscriber that waits no longer."""
        ...


class Schedules(Protocol):
    """What a cron text means on a clock in a time zone."""

    def check(self, cron: str, timezone: str) -> tuple[str, str] | None:
        """The member that is wrong, `cron` or `timezone`, and why; None: it is a schedule."""
        ...

    def next_ms(self, cron: str, timezone: str, after_ms: int) -> int | None:
        """The first moment after another, Unix ms; None: there is none."""
        ...


@dataclass(frozen=True, slots=True)
class DueClock:
    """A workflow whose time has come: what was due up to `after_ms` has been dealt with."""

    workspace: str
    workflow_id: str
    version: int
    after_ms: int


@dataclass(frozen=True, slots=True)
class ClockBeat:
    """What a look at the clocks tells, in the store's own time.

    Args:
        is_keeper: whether this worker keeps time now; else nothing is due to it.
        next_ms: when to look again; None: there are no clocks.
    """

    now_ms: int
    is_keeper: bool
    next_ms: int | None
    due: tuple[DueClock, ...]


class CronStore(Protocol):
    """Clocks, set by the definitions that have them. Raises StoreUnavailableError."""

    async def beat(self, worker_id: str, lease_ms: int, limit: int) -> ClockBeat:
        """Take or renew the lease, and learn which clocks are due."""
        ...

    async def set(self, worker_id: str, clock: DueClock, done_ms: int, next_ms: int | None) -> bool:
        """Write down that all up to `done_ms` is dealt with, and when it is due next.

        False: the lease or the definition is another's by now, and nothing was written.
        """
        ...

    async def release(self, worker_id: str) -> None:
        """Give the lease up."""
        ...


class HookStore(Protocol):
    """Sealed secrets of hooks. Raises StoreUnavailableError."""

    async def find(self, workspace: str, workflow_id: str) -> str:
        """What is sealed for a workflow's hook; empty: it has no secret."""
        ...

    async def set(self, workspace: str, workflow_id: str, present: str, new: str) -> bool:
        """Put another in its place; empty: take it away. False: it was changed meanwhile."""
        ...

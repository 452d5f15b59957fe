"""The outside world of triggers: where events live.

Owns the protocols only, as `ports` does for the rest. Invariant: a port speaks core's values, never
a library's.
"""

from collections.abc import AsyncIterator, Sequence
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

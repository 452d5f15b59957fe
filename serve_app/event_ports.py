"""The outside world of triggers: where events live.

Owns the protocols only, as `ports` does for the rest. Invariant: a port speaks core's values, never
a library's.
"""

from typing import Protocol

from serve_app.core.app_events import AppEvent


class EventStore(Protocol):
    """Events by topic, durable when a call returns. Every call may be repeated without harm."""

    async def publish(self, event: AppEvent, waiting_max: int) -> bool:
        """Accept an event; whether it is new there, by its id, within a day.

        Raises:
            OverloadedError: `waiting_max` messages of its partition wait to be carried out.
        """
        ...

"""What a sender of events does: publish.

Owns the ids and the bounds. Starts nothing: an accepted event is carried out from the outbox of its
topic (`fan_out`). Invariant: an event is durable before its sender hears of it, and a repeat, by
its id or its seed, is accepted and changes nothing.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve_app.core.app_events import AppEvent, derived_event_id
from serve_app.core.errors import BodyTooLargeError, InvalidRequestError
from serve_app.event_ports import EventStore
from serve_app.ports import Entropy


@dataclass(frozen=True, slots=True)
class EventLimits:
    """What one call may bring.

    Args:
        bytes_max: of one event's data, as JSON.
        batch_max: events in one call.
        waiting_max: messages of one partition that wait to be carried out.
    """

    bytes_max: int
    batch_max: int
    waiting_max: int


class Events:
    """Publishing, over one store of topics."""

    def __init__(self, store: EventStore, entropy: Entropy, limits: EventLimits) -> None:
        self._store = store
        self._entropy = entropy
        self._limits = limits

    async def publish(self, events: Sequence[AppEvent], seed: str | None) -> list[str]:
        """Accept events, all or, where the store fails midway, some; their ids, in order.

        An event without an id gets one: derived from `seed` and its place, where there is a seed,
        so that a call that is repeated sends nothing twice.

        Raises:
            InvalidRequestError: too many.
            BodyTooLargeError: one is too large.
            OverloadedError: too many wait already.
        """
        limits = self._limits
        if len(events) > limits.batch_max:
            raise InvalidRequestError(f"at most {limits.batch_max} events in one request")
        named = [replace(event, id=self._id(event, seed, at)) for at, event in enumerate(events)]
        for event in named:
            size = len(json.dumps(event.data, ensure_ascii=False).encode())
            if size > limits.bytes_max:
                raise BodyTooLargeError(
                    f"event {event.name} takes {size} bytes; "
                    f"INFERPIPE_EVENT_MAX_BYTES allows {limits.bytes_max}"
                )
        outcomes = await asyncio.gather(
            *(self._store.publish(event, limits.waiting_max) for event in named),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [event.id for event in named]

    def _id(self, event: AppEvent, seed: str | None, index: int) -> str:
        if event.id:
            return event.id
        if seed is not None:
            return derived_event_id(event.workspace, seed, str(index))
        return f"evt_{self._entropy.token()}"

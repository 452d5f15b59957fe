"""Carrying an accepted event out: it starts every workflow with a trigger that takes it.

Owns who hears of an event. The relay calls it until it returns, and perhaps once more: each thing
it does is done once, by its derived id. Invariant: one workflow that cannot be started holds up no
other, and an event is not dropped while the store is out of reach.
"""

import asyncio
import json
import logging
from collections.abc import Coroutine, Sequence

from serve_app.core.app_events import HOPS_MAX, AppEvent
from serve_app.core.errors import OverloadedError, StoreUnavailableError
from serve_app.core.journal import Outgoing
from serve_app.core.origin import Origin
from serve_app.core.triggers import is_started_by, started_by_event
from serve_app.core.workflow import Workflow
from serve_app.ports import ExecutionStore, Expressions, WorkflowCatalog
from serve_app.services.triggered_starts import TriggeredStart, TriggeredStarts

logger = logging.getLogger(__name__)

_AGAIN = (OverloadedError, StoreUnavailableError)


class FanOut:
    """Events of all workspaces."""

    def __init__(
        self,
        store: ExecutionStore,
        catalog: WorkflowCatalog,
        expressions: Expressions,
        starts: TriggeredStarts,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._expressions = expressions
        self._starts = starts

    async def take(self, outgoing: Outgoing) -> bool:
        """Carry one event out; whether anything new came of it.

        Raises:
            OverloadedError: not all of it could be done; the message is kept and comes again.
            StoreUnavailableError: likewise.
        """
        event = AppEvent(**json.loads(outgoing.body))
        return await _all_done(event, await self._starts_of(event))

    async def _starts_of(self, event: AppEvent) -> list[Coroutine[object, object, bool]]:
        if event.hops >= HOPS_MAX:
            return []
        shown, evaluate = event.shown(), self._expressions.evaluate
        return [
            self._start(event, version, workflow)
            for version, workflow in await self._catalog.triggered(event.workspace)
            if is_started_by(workflow.triggers, shown, evaluate)
        ]

    async def _start(self, event: AppEvent, version: int, workflow: Workflow) -> bool:
        count = self._store.partition_count
        new_id = started_by_event(count, event.workspace, event.id, workflow.id)
        origin = Origin("event", event.id, event.name, event.ts, event.user)
        wish = TriggeredStart(
            execution_id=new_id,
            workspace=event.workspace,
            workflow=workflow,
            version=version,
            origin=origin,
            input=event.data,
            key_id=event.key_id,
            hops=event.hops + 1,
        )
        return await self._starts.start(wish)


async def _all_done(event: AppEvent, works: Sequence[Coroutine[object, object, bool]]) -> bool:
    """Do all of it, side by side; a fault of ours in one is logged, and the event goes on."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, _AGAIN):
            # Coming again it would fail again, and stand before all that comes after it.
            logger.error("event not carried out", exc_info=outcome, extra={"event_id": event.id})
    for outcome in outcomes:
        if isinstance(outcome, _AGAIN) or (
            isinstance(outcome, BaseException) and not isinstance(outcome, Exception)
        ):
            raise outcome
    return any(outcome is True for outcome in outcomes)

"""Carrying an accepted event out: what it starts, whom it answers, what it cancels.

Owns who hears of an event. The relay calls it until it returns, and perhaps once more: each thing
it does is done once, by its derived id. Invariant: one workflow that cannot be started holds up no
other, and an event is not dropped while the store is out of reach.
"""

import asyncio
import json
import logging
from collections.abc import Coroutine, Sequence

from serve_app.core.app_events import HEARD_LOG, HOOK_PREFIX, HOPS_MAX, AppEvent, derived_event_id
from serve_app.core.errors import OverloadedError, StepFailedError, StoreUnavailableError
from serve_app.core.journal import Outgoing
from serve_app.core.origin import Origin
from serve_app.core.subscriptions import Subscriber, heard, is_waiting, read_subscriber
from serve_app.core.triggers import is_started_by, started_by_event
from serve_app.core.workflow import Workflow
from serve_app.event_ports import EventStore
from serve_app.ports import Clock, ExecutionStore, Expressions, WorkflowCatalog
from serve_app.services.appending import append
from serve_app.services.triggered_starts import TriggeredStart, TriggeredStarts

logger = logging.getLogger(__name__)

_AGAIN = (OverloadedError, StoreUnavailableError)


class FanOut:
    """Events of all workspaces."""

    def __init__(
        self,
        events: EventStore,
        store: ExecutionStore,
        catalog: WorkflowCatalog,
        expressions: Expressions,
        starts: TriggeredStarts,
        clock: Clock,
    ) -> None:
        self._events = events
        self._store = store
        self._catalog = catalog
        self._expressions = expressions
        self._starts = starts
        self._clock = clock

    async def take(self, outgoing: Outgoing) -> bool:
        """Carry one event out; whether anything new came of it.

        Raises:
            OverloadedError: not all of it could be done; the message is kept and comes again.
            StoreUnavailableError: likewise.
        """
        message = json.loads(outgoing.body)
        if outgoing.log == HEARD_LOG:
            event, who = AppEvent(**message["event"]), read_subscriber(message["who"])
            return await _all_done(event, [self._tell(event, who)])
        event = AppEvent(**message)
        has_new = await _all_done(event, await self._starts_of(event))
        pages = self._events.subscribers(event.workspace, event.name, outgoing.left_at_ms)
        async for page in pages:
            has_new |= await _all_done(event, [self._tell(event, who) for who in page])
        return has_new

    async def _starts_of(self, event: AppEvent) -> list[Coroutine[object, object, bool]]:
        if event.hops >= HOPS_MAX:
            return []
        shown, evaluate = event.shown(), self._expressions.evaluate
        return [
            self._start(event, version, workflow)
            for version, workflow in await self._catalog.triggered(event.workspace)
            if is_started_by(workflow.id, workflow.triggers, shown, evaluate)
        ]

    async def _start(self, event: AppEvent, version: int, workflow: Workflow) -> bool:
        count = self._store.partition_count
        new_id = started_by_event(count, event.workspace, event.id, workflow.id)
        kind = "webhook" if event.name.startswith(HOOK_PREFIX) else "event"
        origin = Origin(kind, event.id, event.name, event.ts, event.user)
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

    async def _tell(self, event: AppEvent, who: Subscriber) -> bool:
        """Append what the event means to one who waits for it."""
        execution = await self._store.load(who.execution_id)
        if execution is None or not is_waiting(execution, who.path, event.name):
            await self._events.forget(event.workspace, event.name, who)
            return False
        created = execution.created
        if created.workspace != event.workspace:
            return False  # it cannot be: topics are a workspace's own
        workflow = await self._catalog.version(
            created.workspace, created.workflow_id, created.workflow_version
        )
        now_ms, evaluate = self._clock.now_ms(), self._expressions.evaluate
        try:
            decide = heard(event, who.path, workflow, now_ms, evaluate)
            commit_id = derived_event_id("heard", event.id, event.name, str(who))
            return await append(self._store, execution, commit_id, decide)
        except StepFailedError:
            return False  # its `if` has no value for this event: it is none of the step's


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

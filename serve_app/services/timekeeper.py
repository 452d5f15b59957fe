"""Keeping time: starting workflows when their clocks say so.

Owns the beat. One worker at a time holds the lease; the others ask for it with every beat of
theirs. Invariant: a due time is written down as dealt with only when its execution is durable, and
the execution's id follows from the due time: it is started at least once, and never twice.
"""

import asyncio
import logging
from dataclasses import dataclass

from serve_app.core.cron import CLOCK_BACK_MS, due_times
from serve_app.core.errors import ServeAppError, UnknownWorkflowError
from serve_app.core.origin import Origin
from serve_app.core.triggers import CronTrigger, started_by_clock
from serve_app.core.workflow import Workflow
from serve_app.event_ports import ClockBeat, CronStore, DueClock, Schedules
from serve_app.ports import Clock, WorkflowCatalog
from serve_app.services.triggered_starts import TriggeredStart, TriggeredStarts

logger = logging.getLogger(__name__)

BEAT_MS = 1_000  # a new definition's clock is seen so soon; well below the lease
CLOCKS_MAX = 100  # due ones taken with one beat; the rest with the next, at once


@dataclass(frozen=True, slots=True)
class Timing:
    """How often time is looked at, and how long a silent keeper is believed."""

    lease_ms: int = 3_000
    beat_ms: int = BEAT_MS


class Timekeeper:
    """One worker's keeper."""

    def __init__(  # noqa: PLR0913 - one argument per port
        self,
        worker_id: str,
        store: CronStore,
        catalog: WorkflowCatalog,
        schedules: Schedules,
        starts: TriggeredStarts,
        clock: Clock,
        *,
        partition_count: int,
        timing: Timing,
    ) -> None:
        self._worker_id = worker_id
        self._store = store
        self._catalog = catalog
        self._schedules = schedules
        self._starts = starts
        self._clock = clock
        self._partition_count = partition_count
        self._timing = timing

    async def run(self) -> None:
        """Keep time until cancelled, then let another."""
        try:
            while True:
                await self._clock.sleep(await self.beat() / 1000)
        finally:
            await asyncio.shield(self._release())

    async def beat(self) -> int:
        """Look once and start what is due; the ms until the next look."""
        timing = self._timing
        try:
            beat = await self._store.beat(self._worker_id, timing.lease_ms, CLOCKS_MAX)
            outcomes = await asyncio.gather(
                *(self._tick(clock, beat) for clock in beat.due), return_exceptions=True
            )
        except ServeAppError:
            logger.exception("clocks not looked at", extra={"worker_id": self._worker_id})
            return timing.beat_ms
        for clock, outcome in zip(beat.due, outcomes, strict=True):
            if isinstance(outcome, Exception):  # its moment stands, and is due again
                extra = {"workspace": clock.workspace, "workflow_id": clock.workflow_id}
                logger.error("clock not kept", exc_info=outcome, extra=extra)
            elif isinstance(outcome, BaseException):
                raise outcome
        has_failed = any(isinstance(outcome, Exception) for outcome in outcomes)
        if not beat.is_keeper or beat.next_ms is None or has_failed:
            return timing.beat_ms
        if beat.due:
            return 1  # there may be more, and what was set may be near
        return max(1, min(timing.beat_ms, beat.next_ms - beat.now_ms))

    async def _tick(self, clock: DueClock, beat: ClockBeat) -> None:
        try:
            workflow = await self._catalog.version(
                clock.workspace, clock.workflow_id, clock.version
            )
        except UnknownWorkflowError:
            await self._store.set(self._worker_id, clock, beat.now_ms, None)
            return
        after_ms = clock.after_ms
        if after_ms - beat.now_ms > CLOCK_BACK_MS:
            logger.warning("the store's clock went back by %d ms", after_ms - beat.now_ms)
            after_ms = beat.now_ms
        next_ms = self._schedules.next_ms
        due, following = due_times(workflow.triggers, after_ms, beat.now_ms, next_ms)
        await asyncio.gather(
            *(self._start(clock, workflow, at_ms, one) for at_ms, one in due.items())
        )
        done_ms = max(after_ms, beat.now_ms)
        await self._store.set(self._worker_id, clock, done_ms, following)

    async def _start(
        self, clock: DueClock, workflow: Workflow, at_ms: int, trigger: CronTrigger
    ) -> bool:
        workspace, count = clock.workspace, self._partition_count
        new_id = started_by_clock(count, workspace, workflow.id, at_ms)
        origin = Origin("cron", f"{workflow.id}/{at_ms}", trigger.cron, at_ms)
        wish = TriggeredStart(new_id, workspace, workflow, clock.version, origin, {})
        return await self._starts.start(wish)

    async def _release(self) -> None:
        try:
            await self._store.release(self._worker_id)
        except ServeAppError:
            logger.exception("lease kept until it runs out", extra={"worker_id": self._worker_id})

"""Drive one owned execution: fold, decide, commit, run steps, until it ends, parks or is lost.

Owns the step tasks and the order of commits of one execution. Decides nothing (`core.decisions`
does) and keeps nothing that the journal does not have. Invariant: a step with effects runs only
after its start is durable under our token, and a conflict never loses a fact: the missed events
are folded and the same facts are decided again.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from serve_app.core.blocks import is_composite
from serve_app.core.decisions import (
    ChunkArrived,
    Fact,
    Progressed,
    StepFinished,
    StepHandedOver,
)
from serve_app.core.due import next_wake_ms
from serve_app.core.emitted import NOTHING, Emitted
from serve_app.core.errors import (
    ErrorCode,
    OverloadedError,
    ServeAppError,
    StaleLeaseError,
    StepFailedError,
    StoreUnavailableError,
)
from serve_app.core.execution import (
    CancelRequested,
    Execution,
    Folding,
    Status,
    StepStatus,
    Wait,
)
from serve_app.core.failures import StepErrored
from serve_app.core.gate_messages import leave
from serve_app.core.inference import NO_USAGE, JsonValue, Resumed, Usage
from serve_app.core.journal import (
    Commit,
    CommitAnswer,
    Committed,
    Conflict,
    Outgoing,
    Owned,
    Stale,
    StoredEvent,
)
from serve_app.core.workflow import Workflow
from serve_app.services.lost_runs import lost_runs
from serve_app.services.planner import BROKEN, Plan, Planner, Runtime, errored

logger = logging.getLogger(__name__)

ABORT_WAIT_S = 1.0  # for aborted steps to report their usage; cancel must end within 2 s
STORE_RETRY_S = 0.5


@dataclass(slots=True)
class _StepTask:
    """A step under way, and what it has reported beside its text."""

    attempt: int
    task: "asyncio.Task[None]"
    usage: Usage = NO_USAGE
    resumed: Resumed | None = None
    is_aborted: bool = False
    handed_over: tuple[Wait, Outgoing] | None = None


class Driver:
    """One execution under one owner token.

    `on_outgoing` is called when a commit has left messages in the partition's outbox.
    """

    def __init__(
        self,
        owned: Owned,
        workflow: Workflow,
        runtime: Runtime,
        on_outgoing: Callable[[], None] = lambda: None,
    ) -> None:
        self.execution = owned.execution
        self.token = owned.token
        self.ready_depth = 0
        self._on_outgoing = on_outgoing
        self._workflow = workflow
        self._runtime = runtime
        self._facts: list[Fact] = []
        self._notices: list[StoredEvent] = []
        self._tasks: dict[str, _StepTask] = {}
        self._wake = asyncio.Event()
        self._commit_count = 0
        self._is_committing = False
        self._planner = Planner(workflow, runtime)
        self._is_taken_over = owned.execution.status is Status.RUNNING
        self._lost_runs: dict[str, Emitted] = {}  # by step, until it goes on
        # Steps whose change no decision has looked at; None: any may be, look at all.
        self._touched: dict[str, None] | None = None

    def notify(self, events: tuple[StoredEvent, ...]) -> None:
        """Others appended to the journal; what cannot be folded shows as a conflict later.

        A cancel stops what runs at once, even while a commit waits for a store that is away: what
        the steps then report is decided with the next one.
        """
        self._notices.extend(events)
        self._wake.set()
        if self._is_committing and any(isinstance(one.event, CancelRequested) for one in events):
            self._stop(self._tasks.values())

    async def drive(self) -> None:
        """Return when the execution has ended, is parked, or belongs to somebody else."""
        async with asyncio.TaskGroup() as steps:
            try:
                await self._loop(steps)
            except StaleLeaseError as error:
                logger.info("stopped: %s", error, extra={"execution_id": self.execution.id})
            finally:
                for running in self._tasks.values():
                    running.task.cancel()

    async def _loop(self, steps: asyncio.TaskGroup) -> None:
        if self._is_taken_over:
            self._lost_runs = await lost_runs(self.execution, self._workflow, self._runtime)
        while not self.execution.is_terminal:
            self._wake.clear()
            self._fold_notices()
            now_ms = self._runtime.clock.now_ms()
            plan = Plan(self.execution, self._touched)
            if self._is_taken_over:
                self._planner.take_over(plan, now_ms, self._lost_runs.keys())
            self._planner.plan(plan, self._facts, self._tasks.keys(), now_ms)
            if plan.doomed:
                await self._abort_steps(plan.doomed)
                continue
            if plan.events:
                if await self._commit(plan) and self.execution.status is Status.WAITING:
                    return
                self._start_missing(steps)
            else:
                await self._wait(now_ms)

    async def _commit(self, plan: Plan) -> bool:
        """Append a plan; False when it lost a race and must be decided again."""
        # Facts that arrive while the commit is under way belong to the next one.
        sealed = self._facts
        self._facts = []
        self._commit_count += 1
        commit = Commit(
            commit_id=f"{self.token}.{self._commit_count}",
            token=self.token,
            before=plan.before,
            after=plan.after,
            events=tuple(plan.events),
            outgoing=(*plan.outgoing, *await self._outgoing(plan.after)),
        )
        self._touched = None
        self._is_committing = True
        try:
            answer = await self._answer(commit)
        finally:
            self._is_committing = False
        match answer:
            case Committed(ready_depth=ready_depth):
                if commit.outgoing:
                    self._on_outgoing()
                self.execution = plan.after
                self._touched = plan.touched
                self.ready_depth = ready_depth
                self._is_taken_over = False
                return True
            case Conflict(missed=missed, is_ours=is_ours):
                self._fold(missed)
                if is_ours:
                    self._is_taken_over = False
                else:
                    self._facts = sealed + self._facts
                return is_ours
            case Stale():
                raise StaleLeaseError(f"{self.token} does not own {self.execution.id} any more")

    async def _outgoing(self, after: Execution) -> tuple[Outgoing, ...]:
        """What leaves with this commit; asked until it is known."""
        while after.is_terminal:
            try:
                return (*await self._runtime.on_end(after), *self._leave_gates(after))
            except (StoreUnavailableError, OverloadedError):
                logger.exception("end not told yet", extra={"execution_id": after.id})
                await self._runtime.clock.sleep(STORE_RETRY_S)
        return ()

    def _leave_gates(self, after: Execution) -> tuple[Outgoing, ...]:
        """Give its places back, and its result to those who wait for the same."""
        gates = after.created.gates
        has_result = after.status is Status.COMPLETED and gates
        result = json.dumps(after.data) if has_result else None
        return leave(after.id, gates, result, self._runtime.store.partition_count)

    async def _answer(self, commit: Commit) -> CommitAnswer:
        """Send one commit until it is answered.

        Always the same one: what seemed to fail may be in already, and deciding its facts again
        under another id would append its chunks twice.
        """
        while True:
            try:
                return await self._runtime.store.commit(commit)
            except (StoreUnavailableError, OverloadedError):
                logger.exception("commit failed", extra={"execution_id": self.execution.id})
                await self._runtime.clock.sleep(STORE_RETRY_S)

    def _fold_notices(self) -> None:
        notices, self._notices = self._notices, []
        self._fold(tuple(notices))

    def _fold(self, missed: tuple[StoredEvent, ...]) -> None:
        folding = Folding(self.execution)
        for stored in missed:
            if stored.seq == folding.execution.seq + 1:
                folding.add(stored.event)
                self._touched = None
        self.execution = folding.execution

    def _start_missing(self, steps: asyncio.TaskGroup) -> None:
        """Every running step but a composite has a task: start those just made running.

        A step that ended while the commit was under way runs on in the state until its report is
        committed too; it must not run twice.
        """
        reported = {
            (fact.step_id, fact.attempt)
            for fact in self._facts
            if not isinstance(fact, (ChunkArrived, Progressed))
        }
        for step_id in self.execution.live_steps:
            state = self.execution.steps[step_id]
            present = self._tasks.get(step_id)
            is_started = (present is not None and present.attempt == state.attempt) or (
                (step_id, state.attempt) in reported
            )
            is_task = state.status is StepStatus.RUNNING and not is_composite(
                self._workflow, step_id
            )
            if is_task and not is_started and not self._is_taken_over:
                run = self._run(step_id, state.attempt)
                self._tasks[step_id] = _StepTask(state.attempt, steps.create_task(run))

    async def _run(self, step_id: str, attempt: int) -> None:
        fact: Fact
        try:
            output = await self._output(step_id, attempt)
            present = self._tasks.get(step_id)
            if present is not None and present.handed_over is not None:
                fact = StepHandedOver(step_id, attempt, *present.handed_over)
            else:
                fact = StepFinished(step_id, attempt, output)
        except asyncio.CancelledError:
            running = self._tasks.get(step_id)
            if running is None:
                return
            fact = _aborted(step_id, running)
        except ServeAppError as error:
            fact = errored(step_id, attempt, error)
        except Exception:  # a fault of a step type must end the step, not the worker
            logger.exception("step broke", extra=self._place(step_id))
            fact = StepErrored(step_id, attempt, BROKEN, ErrorCode.INTERNAL)
        running = self._tasks.pop(step_id, None)
        if running is not None:  # else it was given up after an abort, and is recorded already
            self._facts.append(_as_reported(fact, running))
            self._wake.set()

    def _place(self, step_id: str) -> dict[str, str]:
        return {"execution_id": self.execution.id, "step_id": step_id}

    async def _output(self, step_id: str, attempt: int) -> JsonValue:
        step = self._workflow.step(step_id)
        run = self._runtime.step_types[step.type].run
        assert run is not None, "a pure step is computed, never run"
        call = self._planner.call(
            self.execution,
            step_id,
            lambda text, ids: self._emit(step_id, attempt, text, ids),
            lambda usage: self._report_usage(step_id, usage),
            lambda progress, message: self._publish(step_id, attempt, progress, message),
        )
        call = replace(
            call,
            hand_over=lambda wait, outgoing: self._hand_over(step_id, wait, outgoing),
            emitted=self._lost_runs.pop(step_id, NOTHING),
            report_resumed=lambda resumed: self._report_resumed(step_id, resumed),
        )
        limit = asyncio.timeout(None if step.timeout_ms is None else step.timeout_ms / 1000)
        try:
            async with limit:
                return await run(call)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the step's own
            raise StepFailedError(f"not done within {step.timeout_ms} ms") from error

    def _emit(self, step_id: str, attempt: int, text: str, token_ids: tuple[int, ...]) -> None:
        """Join what arrives while a commit is under way into one chunk."""
        last = self._facts[-1] if self._facts else None
        if isinstance(last, ChunkArrived) and last.step_id == step_id and last.attempt == attempt:
            self._facts[-1] = ChunkArrived(
                step_id, attempt, last.text + text, last.token_ids + token_ids
            )
        elif text or token_ids:
            self._facts.append(ChunkArrived(step_id, attempt, text, token_ids))
        self._wake.set()

    def _hand_over(self, step_id: str, wait: Wait, outgoing: Outgoing) -> None:
        if step_id in self._tasks:
            self._tasks[step_id].handed_over = (wait, outgoing)

    def _publish(self, step_id: str, attempt: int, progress: float, message: str) -> None:
        self._facts.append(Progressed(step_id, attempt, progress, message))
        self._wake.set()

    def _report_usage(self, step_id: str, usage: Usage) -> None:
        if step_id in self._tasks:
            self._tasks[step_id].usage = usage

    def _report_resumed(self, step_id: str, resumed: Resumed) -> None:
        if step_id in self._tasks:
            self._tasks[step_id].resumed = resumed

    async def _abort_steps(self, doomed: Iterable[str]) -> None:
        """Cancel what runs and wait for what it reports; whatever is left then counts as aborted.

        A task that is cancelled before its first turn never runs, so it never reports either.
        """
        aborted = {step_id: self._tasks[step_id] for step_id in doomed}
        self._stop(aborted.values())
        await asyncio.wait([running.task for running in aborted.values()], timeout=ABORT_WAIT_S)
        for step_id, running in aborted.items():
            if self._tasks.get(step_id) is running:
                del self._tasks[step_id]
                self._facts.append(_aborted(step_id, running))

    def _stop(self, doomed: Iterable[_StepTask]) -> None:
        for running in doomed:
            if not running.is_aborted:  # a second cancel would cut its last words off
                running.is_aborted = True
                running.task.cancel()

    async def _wait(self, now_ms: int) -> None:
        wakes = (next_wake_ms(self.execution), self.execution.wake_at_ms)
        wake_ms = min((wake for wake in wakes if wake is not None), default=None)
        # One millisecond more: a timer may fire a fraction early, and then nothing is due yet.
        timeout_s = None if wake_ms is None else max(0, wake_ms - now_ms + 1) / 1000
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return


def _aborted(step_id: str, running: _StepTask) -> StepErrored:
    code, is_aborted = ErrorCode.CANCELLED, running.is_aborted
    fact = StepErrored(step_id, running.attempt, "aborted", code, is_aborted=is_aborted)
    return replace(fact, usage=running.usage)


def _as_reported(fact: Fact, running: _StepTask) -> Fact:
    match fact:
        case StepFinished():
            return replace(fact, usage=running.usage, resumed=running.resumed)
        case StepErrored():
            return replace(fact, usage=running.usage)
        case StepHandedOver() | ChunkArrived() | Progressed():
            return fact

"""Drive one owned execution: fold, decide, commit, run steps, until it ends, parks or is lost.

Owns the step tasks and the order of commits of one execution. Decides nothing (`core.decisions`
does) and keeps nothing that the journal does not have. Invariant: a step with effects runs only
after its start is durable under our token, and a conflict never loses a fact: the missed events
are folded and the same facts are decided again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.core.decisions import (
    ChunkArrived,
    Fact,
    StepErrored,
    StepFinished,
    due_events,
    is_ending,
    next_wake_ms,
    record,
    scope_of,
    take_over,
)
from serve_app.core.errors import (
    ErrorCode,
    OverloadedError,
    ServeAppError,
    StaleLeaseError,
    StepFailedError,
    StoreUnavailableError,
)
from serve_app.core.execution import Event, Execution, Status, StepStarted, StepStatus, evolve
from serve_app.core.inference import NO_USAGE, JsonValue, Usage
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
from serve_app.core.template import render
from serve_app.core.workflow import Workflow
from serve_app.ports import Clock, Entropy, Expressions, StepCall, StepType, WorkerStore

logger = logging.getLogger(__name__)

ABORT_WAIT_S = 1.0  # for aborted steps to report their usage; cancel must end within 2 s
STORE_RETRY_S = 0.5
BROKEN = "internal error in the step"  # all that a caller is told of a bug; the log has the rest
RUNNABLE_AGAIN = frozenset({ErrorCode.INTERNAL, ErrorCode.OVERLOADED, ErrorCode.STEP_FAILED})


OnEnd = Callable[[Execution], Awaitable[Sequence[Outgoing]]]


async def tell_nobody(execution: Execution) -> Sequence[Outgoing]:  # noqa: ARG001 - an `OnEnd`
    """Nothing leaves with the end of an execution."""
    return ()


@dataclass(frozen=True, slots=True)
class Runtime:
    """What all executions of a worker share.

    Args:
        on_end: what leaves with the commit that ends an execution; it may be asked again about
            the same end, and must then answer the same message ids. What it raises for a store
            out of reach is tried again; nothing ends without its messages.
    """

    store: WorkerStore
    step_types: Mapping[str, StepType]
    expressions: Expressions
    clock: Clock
    entropy: Entropy
    on_end: OnEnd = tell_nobody


@dataclass(slots=True)
class _Plan:
    """Events decided on top of `before`."""

    before: Execution
    after: Execution
    events: list[Event] = field(default_factory=list)

    def add(self, events: tuple[Event, ...]) -> None:
        for event in events:
            self.after = evolve(self.after, event)
            self.events.append(event)


@dataclass(slots=True)
class _StepTask:
    """A step under way, and the usage it has reported."""

    attempt: int
    task: "asyncio.Task[None]"
    usage: Usage = NO_USAGE


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
        self._is_taken_over = owned.execution.status is Status.RUNNING

    def notify(self, events: tuple[StoredEvent, ...]) -> None:
        """Others appended to the journal; what cannot be folded shows as a conflict later."""
        self._notices.extend(events)
        self._wake.set()

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
        while not self.execution.is_terminal:
            self._wake.clear()
            self._fold_notices()
            now_ms = self._runtime.clock.now_ms()
            plan = self._plan(now_ms)
            if self._tasks and is_ending(plan.after, now_ms):
                await self._abort_steps()
                plan = self._plan(self._runtime.clock.now_ms())
            if plan.events:
                if await self._commit(plan) and self.execution.status is Status.WAITING:
                    return
                self._start_missing(steps)
            else:
                await self._wait(now_ms)

    def _plan(self, now_ms: int) -> _Plan:
        plan = _Plan(self.execution, self.execution)
        if self._is_taken_over:
            plan.add(take_over(plan.after, now_ms))
        for fact in self._facts:
            plan.add(self._recorded(plan.after, fact, now_ms))
        if self._tasks and is_ending(plan.after, now_ms):
            return plan  # the caller aborts the steps under way and asks again
        evaluate = self._runtime.expressions.evaluate
        while due := due_events(plan.after, self._workflow, now_ms, evaluate):
            plan.add(due)
            for event in due:
                if isinstance(event, StepStarted):
                    self._compute(plan, event, now_ms)
        return plan

    def _compute(self, plan: _Plan, started: StepStarted, now_ms: int) -> None:
        """Run a pure step inside the decision; its start and its result share one commit."""
        step_type = self._runtime.step_types[self._workflow.step(started.step_id).type]
        step = plan.after.steps[started.step_id]
        if step_type.compute is None or step.status is not StepStatus.RUNNING:
            return
        fact: Fact
        try:
            output = step_type.compute(self._call(plan.after, started.step_id, started.attempt))
            fact = StepFinished(started.step_id, started.attempt, output)
        except ServeAppError as error:
            fact = _errored(started.step_id, started.attempt, error, NO_USAGE)
        except Exception:  # else the driver breaks, is adopted again, and breaks again
            logger.exception("step broke", extra=self._place(started.step_id))
            fact = StepErrored(started.step_id, started.attempt, BROKEN, ErrorCode.INTERNAL)
        plan.add(self._recorded(plan.after, fact, now_ms))

    def _recorded(self, execution: Execution, fact: Fact, now_ms: int) -> tuple[Event, ...]:
        jitter = self._runtime.entropy.uniform() if isinstance(fact, StepErrored) else 0.0
        return record(execution, self._workflow, fact, now_ms, jitter)

    async def _commit(self, plan: _Plan) -> bool:
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
            outgoing=await self._outgoing(plan.after),
        )
        match await self._answer(commit):
            case Committed(ready_depth=ready_depth):
                if commit.outgoing:
                    self._on_outgoing()
                self.execution = plan.after
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
                return tuple(await self._runtime.on_end(after))
            except (StoreUnavailableError, OverloadedError):
                logger.exception("end not told yet", extra={"execution_id": after.id})
                await self._runtime.clock.sleep(STORE_RETRY_S)
        return ()

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
        for stored in missed:
            if stored.seq == self.execution.seq + 1:
                self.execution = evolve(self.execution, stored.event)

    def _start_missing(self, steps: asyncio.TaskGroup) -> None:
        """Every running step has a task: start those that a commit just made running.

        A step that ended while the commit was under way runs on in the state until its report is
        committed too; it must not run twice.
        """
        reported = {
            (fact.step_id, fact.attempt)
            for fact in self._facts
            if not isinstance(fact, ChunkArrived)
        }
        for step_id, state in self.execution.steps.items():
            present = self._tasks.get(step_id)
            is_started = (present is not None and present.attempt == state.attempt) or (
                (step_id, state.attempt) in reported
            )
            if state.status is StepStatus.RUNNING and not is_started and not self._is_taken_over:
                run = self._run(step_id, state.attempt)
                self._tasks[step_id] = _StepTask(state.attempt, steps.create_task(run))

    async def _run(self, step_id: str, attempt: int) -> None:
        fact: Fact
        try:
            fact = StepFinished(step_id, attempt, await self._output(step_id, attempt))
        except asyncio.CancelledError:
            fact = StepErrored(step_id, attempt, "aborted", ErrorCode.CANCELLED)
        except ServeAppError as error:
            fact = _errored(step_id, attempt, error, NO_USAGE)
        except Exception:  # a fault of a step type must end the step, not the worker
            logger.exception("step broke", extra=self._place(step_id))
            fact = StepErrored(step_id, attempt, BROKEN, ErrorCode.INTERNAL)
        running = self._tasks.pop(step_id, None)
        if running is not None:  # else it was given up after an abort, and is recorded already
            self._facts.append(_with_usage(fact, running.usage))
            self._wake.set()

    def _place(self, step_id: str) -> dict[str, str]:
        return {"execution_id": self.execution.id, "step_id": step_id}

    async def _output(self, step_id: str, attempt: int) -> JsonValue:
        step = self._workflow.step(step_id)
        run = self._runtime.step_types[step.type].run
        assert run is not None, "a pure step is computed, never run"
        call = self._call(self.execution, step_id, attempt)
        limit = asyncio.timeout(None if step.timeout_ms is None else step.timeout_ms / 1000)
        try:
            async with limit:
                return await run(call)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the step's own
            raise StepFailedError(f"not done within {step.timeout_ms} ms") from error

    def _call(self, execution: Execution, step_id: str, attempt: int) -> StepCall:
        scope = scope_of(execution)
        evaluate = self._runtime.expressions.evaluate
        settings = render(self._workflow.step(step_id).settings, lambda text: evaluate(text, scope))
        return StepCall(
            execution_id=execution.id,
            step_id=step_id,
            attempt=attempt,
            settings=settings,
            input=execution.created.input,
            idempotency_key=f"{execution.id}/{step_id}/{attempt}",
            deadline_ms=execution.created.deadline_ms,
            priority=execution.created.priority,
            emit=lambda text, ids: self._emit(step_id, attempt, text, ids),
            report_usage=lambda usage: self._report_usage(step_id, usage),
            workspace=execution.created.workspace,
        )

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

    def _report_usage(self, step_id: str, usage: Usage) -> None:
        if step_id in self._tasks:
            self._tasks[step_id].usage = usage

    async def _abort_steps(self) -> None:
        """Cancel what runs and wait for what it reports; whatever is left then counts as aborted.

        A task that is cancelled before its first turn never runs, so it never reports either.
        """
        aborted = self._tasks
        tasks = [running.task for running in aborted.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=ABORT_WAIT_S)
        for step_id, running in tuple(aborted.items()):
            fact = StepErrored(step_id, running.attempt, "aborted", ErrorCode.CANCELLED)
            self._facts.append(_with_usage(fact, running.usage))
        aborted.clear()

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


def _errored(step_id: str, attempt: int, error: ServeAppError, usage: Usage) -> StepErrored:
    is_retryable = (
        error.retryable if isinstance(error, StepFailedError) else error.code in RUNNABLE_AGAIN
    )
    return StepErrored(step_id, attempt, str(error), error.code, is_retryable, usage)


def _with_usage(fact: Fact, usage: Usage) -> Fact:
    match fact:
        case StepFinished(step_id=step_id, attempt=attempt, output=output):
            return StepFinished(step_id, attempt, output, usage)
        case StepErrored(step_id, attempt, error, code, is_retryable):
            return StepErrored(step_id, attempt, error, code, is_retryable, usage)
        case ChunkArrived():
            return fact

"""What one commit of a driver will hold: facts recorded, what is due decided, pure steps computed.

Owns the order of decisions on the way to a commit. Awaits nothing and changes nothing: a plan that
lost a race is thrown away and made again. Invariant: a plan is the fold of its own events.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from serve_app.core.app_events import event_message
from serve_app.core.children import cancels, end
from serve_app.core.decisions import (
    Fact,
    StepFinished,
    StepHandedOver,
    record,
    take_over,
)
from serve_app.core.due import RESULT_BYTES_MAX, doomed_steps, due_events
from serve_app.core.errors import ErrorCode, ServeAppError, StepFailedError
from serve_app.core.execution import (
    STEP_EVENTS,
    ChunkEmitted,
    Event,
    Execution,
    Folding,
    StepProgressed,
    StepStarted,
    StepStatus,
    StepWaiting,
)
from serve_app.core.failures import StepErrored
from serve_app.core.gate_messages import spent
from serve_app.core.inference import Usage
from serve_app.core.journal import Outgoing
from serve_app.core.scope import scope_of
from serve_app.core.subscriptions import at_commit
from serve_app.core.template import render
from serve_app.core.tools import turn_of
from serve_app.core.workflow import Workflow
from serve_app.ports import Clock, Entropy, Expressions, StepCall, StepType, WorkerStore

logger = logging.getLogger(__name__)

PLAN_EVENTS_MAX = 500  # of one commit, about: the store does nothing else meanwhile
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
        result_bytes_max: of what a composite or an execution gives, as JSON; `steps.bounds` has the
            same for other steps.
    """

    store: WorkerStore
    step_types: Mapping[str, StepType]
    expressions: Expressions
    clock: Clock
    entropy: Entropy
    on_end: OnEnd = tell_nobody
    result_bytes_max: int = RESULT_BYTES_MAX


class Plan:
    """Events decided on top of `before`.

    `touched` has the steps they changed that no decision has looked at yet; None: look at all.
    `doomed` are steps under way that must be aborted before anything can be decided.
    """

    def __init__(self, before: Execution, touched: Iterable[str] | None) -> None:
        self.before = before
        self.events: list[Event] = []
        self.outgoing: list[Outgoing] = []
        self.touched = None if touched is None else dict.fromkeys(touched)
        self.doomed: set[str] = set()
        self._folding = Folding(before)

    @property
    def after(self) -> Execution:
        """The state that the events give."""
        return self._folding.execution

    def add(self, events: tuple[Event, ...]) -> None:
        """Decided: these too."""
        for event in events:
            self._folding.add(event)
            self.events.append(event)
            if not isinstance(event, STEP_EVENTS):
                self.touched = None
            elif self.touched is not None and not isinstance(event, ChunkEmitted):
                self.touched[event.step_id] = None

    def examined(self) -> None:
        """All that changed so far was looked at."""
        self.touched = {}


class Planner:
    """Plans for one workflow."""

    def __init__(self, workflow: Workflow, runtime: Runtime) -> None:
        self._workflow = workflow
        self._runtime = runtime

    def plan(self, plan: Plan, facts: Sequence[Fact], busy: Collection[str], now_ms: int) -> Plan:
        """Decide until nothing is due, a step under way is in the way, or a commit is full.

        `busy` names the steps under way.
        """
        for fact in facts:
            events = self._recorded(plan.after, fact, now_ms)
            plan.add(events)
            if isinstance(fact, StepHandedOver) and isinstance(
                next(iter(events), None), StepWaiting
            ):
                plan.outgoing.append(fact.outgoing)
        workflow, evaluate = self._workflow, self._runtime.expressions.evaluate
        bytes_max = self._runtime.result_bytes_max
        while len(plan.events) < PLAN_EVENTS_MAX:
            plan.doomed = doomed_steps(plan.after, workflow, now_ms, plan.touched).intersection(
                busy
            )
            if plan.doomed:
                break
            due = due_events(plan.after, workflow, now_ms, evaluate, plan.touched, bytes_max)
            plan.examined()
            if not due:
                break
            plan.add(due)
            for event in due:
                if isinstance(event, StepStarted):
                    self._compute(plan, event, now_ms)
        partition_count = self._partition_count
        plan.outgoing += cancels(plan.after, plan.events, partition_count)
        plan.outgoing += at_commit(plan.after, plan.events, partition_count)
        plan.outgoing += spent(plan.after, plan.events, partition_count)
        if plan.after.is_terminal:
            plan.outgoing += end(plan.after, partition_count)
        return plan

    def take_over(self, plan: Plan, now_ms: int, resumable: Collection[str]) -> None:
        """Void what the worker before had under way, or go on with it."""
        plan.add(take_over(plan.after, self._workflow, now_ms, resumable))

    def call(
        self,
        execution: Execution,
        step_id: str,
        emit: Callable[[str, tuple[int, ...]], None] = lambda _text, _ids: None,
        report_usage: Callable[[Usage], None] = lambda _usage: None,
        publish: Callable[[float, str], None] = lambda _progress, _message: None,
    ) -> StepCall:
        """The present attempt of a step, its settings filled in.

        Raises:
            StepFailedError: an expression has no value.
        """
        step, attempt = self._workflow.step(step_id), execution.steps[step_id].attempt
        scope = cache(lambda: scope_of(execution, self._workflow, step_id))
        evaluate = self._runtime.expressions.evaluate
        return StepCall(
            execution_id=execution.id,
            step_id=step_id,
            attempt=attempt,
            settings=render(step.settings, lambda text: evaluate(text, scope())),
            input=execution.created.input,
            idempotency_key=f"{execution.id}/{step_id}/{attempt}",
            deadline_ms=execution.created.deadline_ms,
            priority=execution.created.priority,
            emit=emit,
            report_usage=report_usage,
            created=execution.created,
            publish=publish,
            workspace=execution.created.workspace,
            turn=turn_of(execution, self._workflow, step_id),
        )

    def _compute(self, plan: Plan, started: StepStarted, now_ms: int) -> None:
        """Run a pure step inside the decision; its start and its result share one commit."""
        definition = self._workflow.step(started.step_id)
        status = plan.after.steps[started.step_id].status
        if definition.blocks or status is not StepStatus.RUNNING:
            return
        step_type = self._runtime.step_types[definition.type]
        if step_type.run is not None:
            return
        step_id, attempt = started.step_id, started.attempt
        fact: Fact
        try:
            call = self.call(plan.after, step_id)
            if step_type.wait is not None:
                plan.add((StepWaiting(now_ms, step_id, step_type.wait(call, now_ms)),))
                return
            assert step_type.compute is not None, "one of the three is set"
            said: list[Event] = []
            sent: list[Outgoing] = []
            call = replace(
                call,
                publish=lambda progress, message: said.append(
                    StepProgressed(now_ms, step_id, progress, message)
                ),
                send=lambda event: sent.append(
                    event_message(replace(event, ts=now_ms), self._partition_count)
                ),
            )
            fact = StepFinished(step_id, attempt, step_type.compute(call))
            plan.add(tuple(said))
            plan.outgoing += sent
        except ServeAppError as error:
            fact = errored(step_id, attempt, error)
        except Exception:  # else the driver breaks, is adopted again, and breaks again
            logger.exception("step broke", extra={"execution_id": plan.after.id})
            fact = StepErrored(step_id, attempt, BROKEN, ErrorCode.INTERNAL)
        plan.add(self._recorded(plan.after, fact, now_ms))

    @property
    def _partition_count(self) -> int:
        return self._runtime.store.partition_count

    def _recorded(self, execution: Execution, fact: Fact, now_ms: int) -> tuple[Event, ...]:
        jitter = self._runtime.entropy.uniform() if isinstance(fact, StepErrored) else 0.0
        return record(execution, self._workflow, fact, now_ms, jitter)


def errored(step_id: str, attempt: int, error: ServeAppError) -> StepErrored:
    """What a step reports that raised; our own errors say whether another try may help."""
    is_retryable = (
        error.retryable if isinstance(error, StepFailedError) else error.code in RUNNABLE_AGAIN
    )
    retry_after_ms = error.retry_after_ms if isinstance(error, StepFailedError) else None
    return StepErrored(
        step_id, attempt, str(error), error.code, is_retryable, retry_after_ms=retry_after_ms
    )

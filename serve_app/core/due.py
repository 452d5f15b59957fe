"""What is due by itself: starts, ends of blocks, deadlines, parking, the end of an execution.

Owns which steps start and when an execution parks or ends. Awaits nothing and reads no clock: time
and the expression evaluator come in as arguments. Invariant: the same arguments give the same
events, in an order that `evolve` accepts; naming the steps that changed (`touched`) makes a
decision cheaper and never another one.
"""

from collections.abc import Callable, Collection, Mapping

from serve_app.core.blocks import (
    LIVE_MAX,
    MAP_ITEMS_MAX,
    STARTED_MAX,
    blocks_to_examine,
    concurrency,
    failed_steps,
    failure_of,
    is_composite,
    is_running,
    is_skipping,
    is_started,
    live_under,
    output_of,
    rounds_max,
    started_count,
)
from serve_app.core.errors import ErrorCode, StepFailedError
from serve_app.core.execution import (
    Event,
    Execution,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionFailed,
    ExecutionParked,
    ExecutionResumed,
    ExecutionStarted,
    MapOpened,
    Status,
    StepCompleted,
    StepFailed,
    StepSkipped,
    StepStarted,
    StepStatus,
)
from serve_app.core.inference import NO_USAGE, JsonValue, Usage
from serve_app.core.scope import (
    FINISHED,
    block_of,
    composite_of,
    in_block,
    scope_after_round,
    scope_of,
)
from serve_app.core.template import render
from serve_app.core.workflow import Step, Workflow, ready_steps

Scope = Mapping[str, object]
Evaluate = Callable[[str, Scope], object]

EVENTS_MAX = 200_000  # of one journal: some 50 MB in the store; only a runaway loop has more


def is_ending(execution: Execution, now_ms: int) -> bool:
    """Whether the steps under way must be aborted because the execution ends now."""
    return (
        execution.status is Status.CANCELLING
        or is_overdue(execution, now_ms)
        or execution.failed is not None
        or _limit_reached(execution) is not None
    )


def is_overdue(execution: Execution, now_ms: int) -> bool:
    """Whether the deadline has passed before it ended."""
    deadline_ms = execution.created.deadline_ms
    return not execution.is_terminal and deadline_ms is not None and now_ms >= deadline_ms


def doomed_steps(
    execution: Execution, workflow: Workflow, now_ms: int, touched: Collection[str] | None
) -> set[str]:
    """The steps under way that must be aborted before `due_events` is asked."""
    if is_ending(execution, now_ms):
        return set(execution.live_steps)
    return {
        path
        for _, ended in failed_steps(execution, workflow, touched)
        for path in live_under(execution, ended)
    }


def due_events(
    execution: Execution,
    workflow: Workflow,
    now_ms: int,
    evaluate: Evaluate,
    touched: Collection[str] | None = None,
) -> tuple[Event, ...]:
    """What is due by itself, one round; the caller folds it and asks again until it is empty.

    Steps that are `running` are left alone unless what they stand in is ending, when the caller
    has aborted them before (`doomed_steps`). `touched` names the steps whose state changed since
    the round before; None: look at all of them.
    """
    if execution.is_terminal:
        return ()
    if is_ending(execution, now_ms):
        return _ending(execution, now_ms)
    if execution.status is Status.PENDING:
        return (ExecutionStarted(now_ms),)
    if execution.status is Status.WAITING:
        is_due = execution.wake_at_ms is not None and now_ms >= execution.wake_at_ms
        return (ExecutionResumed(now_ms),) if is_due else ()
    due = _Round(execution, workflow, now_ms, evaluate).events(touched)
    return due or _rest(execution, workflow, now_ms, evaluate)


def next_wake_ms(execution: Execution) -> int | None:
    """When the owner must look again although nothing reports: a retry or the deadline."""
    steps = (execution.steps[path] for path in execution.live_steps)
    wakes = [step.wake_at_ms for step in steps if step.wake_at_ms is not None]
    if execution.created.deadline_ms is not None:
        wakes.append(execution.created.deadline_ms)
    return min(wakes, default=None)


class _Round:
    """One round of decisions on one state; `_events` has what was decided so far."""

    def __init__(
        self, execution: Execution, workflow: Workflow, now_ms: int, evaluate: Evaluate
    ) -> None:
        self._execution = execution
        self._workflow = workflow
        self._now_ms = now_ms
        self._evaluate = evaluate
        self._events: list[Event] = []
        self._cut: set[str] = set()
        self._at_work: set[str] = set()  # blocks that got an event in this round
        self._failed: list[str] = []  # blocks and composites that failed in this round

    def events(self, touched: Collection[str] | None) -> tuple[Event, ...]:
        execution, workflow = self._execution, self._workflow
        for path, ended in failed_steps(execution, workflow, touched):
            self._fail(path, ended)
        composites: dict[str, None] = {}
        for path in execution.live_steps if touched is None else touched:
            if path in execution.live_steps and is_composite(workflow, path):
                composites[path] = None
        for block in blocks_to_examine(execution, workflow, touched):
            if not self._is_over(composite_of(block)):
                self._start_ready(block)
                if block:
                    composites[composite_of(block)] = None
        for composite in composites:
            if not self._is_over(composite):
                self._advance(composite)
        self._start_retries()
        return tuple(self._events)

    def _is_over(self, composite: str) -> bool:
        return self._has_failed(composite) or not is_running(self._execution, composite)

    def _has_failed(self, path: str) -> bool:
        """Whether the step, block or composite is in what failed in this round, or is it."""
        return any(f"{path}/".startswith(f"{failed}/") for failed in self._failed)

    def _fail(self, path: str, ended: str) -> None:
        """A failed step ends its block or its composite; what else runs in there was aborted."""
        if self._has_failed(ended):
            return
        self._failed.append(ended)
        for inner in live_under(self._execution, ended):
            if inner not in self._cut:
                self._cut.add(inner)
                self._events.append(cut_off(inner, ErrorCode.CANCELLED, self._now_ms))
        if not is_skipping(self._workflow, composite_of(block_of(path))):
            error = failure_of(path, self._execution.steps[path])
            self._cut.add(ended)
            self._events.append(StepFailed(self._now_ms, ended, error, ErrorCode.STEP_FAILED))

    def _start_ready(self, block: str) -> None:
        """Start the steps of a block whose needs are done."""
        steps = self._workflow.steps_at(block)
        states = {step.id: self._execution.steps.get(in_block(block, step.id)) for step in steps}
        started = {step_id: state.status for step_id, state in states.items() if state is not None}
        if StepStatus.FAILED in started.values():
            return
        done = [step_id for step_id, status in started.items() if status in FINISHED]
        scope: Scope | None = None
        for step in ready_steps(steps, done, started):
            if step.when is not None and scope is None:
                path = in_block(block, step.id)
                scope = scope_of(self._execution, self._workflow, path)
            self._start(step, block, scope or {})

    def _start(self, step: Step, block: str, scope: Scope) -> None:
        path, now_ms = in_block(block, step.id), self._now_ms
        self._at_work.add(block)
        verdict: object = True
        if step.when is not None:
            verdict = self._verdict(path, "when", step.when, scope)
        if verdict is None:
            return
        self._events.append(StepStarted(now_ms, path, 1) if verdict else StepSkipped(now_ms, path))

    def _verdict(self, path: str, name: str, text: str, scope: Scope) -> bool | None:
        """What a condition says; None: it says nothing, and the step has failed by it."""
        try:
            verdict = self._evaluate(text, scope)
        except StepFailedError as error:
            self._refuse(path, f"{name}: {error}")
            return None
        if isinstance(verdict, bool):
            return verdict
        self._refuse(path, f"{name}: the expression must give true or false")
        return None

    def _refuse(self, path: str, error: str) -> None:
        if path not in self._execution.steps:
            self._events.append(StepStarted(self._now_ms, path, 1))
        self._events.append(StepFailed(self._now_ms, path, error, ErrorCode.STEP_FAILED))

    def _advance(self, composite: str) -> None:
        """Open the next blocks of a composite, or end it."""
        step = self._workflow.step(composite)
        match step.type:
            case "map":
                self._advance_map(composite, step)
            case "loop":
                self._advance_loop(composite, step)
            case _:
                self._advance_fixed(composite, step)

    def _open_count(self, composite: str) -> int:
        """Blocks of a composite in which something is at work."""
        depth = len(composite) + 1
        live = {path[depth:].partition("/")[0] for path in live_under(self._execution, composite)}
        now = {
            block[depth:].partition("/")[0]
            for block in self._at_work
            if block.startswith(f"{composite}/")
        }
        return len(live | now)

    def _advance_fixed(self, composite: str, step: Step) -> None:
        blocks = [f"{composite}/{block.key}" for block in step.blocks]
        if any(is_started(self._execution, self._workflow, block) for block in blocks):
            if not self._open_count(composite):
                self._complete(composite)
        elif step.type == "parallel":
            for block in blocks:
                self._start_ready(block)
        else:
            self._choose(composite, step)

    def _choose(self, composite: str, step: Step) -> None:
        """Open the first case of a branch that holds."""
        scope = scope_of(self._execution, self._workflow, composite)
        for block in step.blocks:
            name = f"case {block.key}: when"
            holds = block.when is None or self._verdict(composite, name, block.when, scope)
            if holds is None:
                return
            if holds:
                self._start_ready(f"{composite}/{block.key}")
                return
        self._complete(composite)

    def _advance_loop(self, composite: str, step: Step) -> None:
        if self._open_count(composite):
            return
        rounds = started_count(self._execution, self._workflow, composite)
        goes_on: bool | None = False
        if rounds < rounds_max(step):
            scope = scope_after_round(self._execution, self._workflow, composite, rounds)
            goes_on = self._verdict(composite, "while", str(step.setting("while")), scope)
        if goes_on:
            self._start_ready(f"{composite}/{rounds}")
        elif goes_on is False:
            self._complete(composite)

    def _advance_map(self, composite: str, step: Step) -> None:
        items = self._execution.steps[composite].items
        if items is None:
            self._open_map(composite, step)
            return
        started = started_count(self._execution, self._workflow, composite)
        open_count = self._open_count(composite)
        room = LIVE_MAX - len(self._execution.live_steps) - len(self._events)
        opened = min(len(items) - started, max(0, concurrency(step) - open_count))
        if opened > room:
            opened = max(room, 1 - min(1, open_count))  # never none at all, or it would stand still
        for index in range(started, started + opened):
            self._start_ready(f"{composite}/{index}")
        if started == len(items) and not open_count:
            self._complete(composite)

    def _open_map(self, composite: str, step: Step) -> None:
        scope = scope_of(self._execution, self._workflow, composite)
        try:
            items = render(step.setting("over"), lambda text: self._evaluate(text, scope))
        except StepFailedError as error:
            self._refuse(composite, f"over: {error}")
            return
        if not isinstance(items, list):
            self._refuse(composite, "over: the expression must give a list")
        elif len(items) > MAP_ITEMS_MAX:
            limit = f"a map takes at most {MAP_ITEMS_MAX}"
            self._refuse(composite, f"over: {len(items)} items; {limit}")
        else:
            self._events.append(MapOpened(self._now_ms, composite, tuple(items)))

    def _complete(self, composite: str) -> None:
        output = output_of(self._execution, self._workflow, composite)
        self._events.append(StepCompleted(self._now_ms, composite, output))

    def _start_retries(self) -> None:
        for path in self._execution.live_steps:
            state = self._execution.steps[path]
            is_due = state.wake_at_ms is not None and state.wake_at_ms <= self._now_ms
            if is_due and not self._has_failed(path):
                self._events.append(StepStarted(self._now_ms, path, state.attempt))


def cut_off(path: str, code: str, now_ms: int, usage: Usage | None = None) -> StepFailed:
    """The end of a step that was aborted."""
    return StepFailed(now_ms, path, "aborted", code, usage or NO_USAGE)


def cut_off_code(execution: Execution, now_ms: int) -> ErrorCode:
    """Why a step under way was aborted; one whose neighbour failed is cancelled, not failed."""
    is_timeout = execution.status is not Status.CANCELLING and is_overdue(execution, now_ms)
    return ErrorCode.TIMEOUT if is_timeout else ErrorCode.CANCELLED


def _ending(execution: Execution, now_ms: int) -> tuple[Event, ...]:
    code = cut_off_code(execution, now_ms)
    running = [
        path for path in execution.live_steps if execution.steps[path].status is StepStatus.RUNNING
    ]
    cut = [cut_off(path, code, now_ms) for path in running]
    resumed = [ExecutionResumed(now_ms)] if execution.status is Status.WAITING and running else []
    return (*resumed, *cut, _end(execution, now_ms))


def _end(execution: Execution, now_ms: int) -> Event:
    if execution.status is Status.CANCELLING:
        return ExecutionCancelled(now_ms, execution.cancel_reason or "cancelled")
    limit = _limit_reached(execution)
    if execution.failed is not None and not is_overdue(execution, now_ms):
        step = execution.steps[execution.failed]
        error = f"step {failure_of(execution.failed, step)}"
        return ExecutionFailed(now_ms, error, ErrorCode.STEP_FAILED)
    if limit is not None and not is_overdue(execution, now_ms):
        return ExecutionFailed(now_ms, limit, ErrorCode.STEP_FAILED)
    timeout_ms = execution.created.timeout_ms
    return ExecutionFailed(now_ms, f"not done within {timeout_ms} ms", ErrorCode.TIMEOUT)


def _limit_reached(execution: Execution) -> str | None:
    """Which bound an execution has grown beyond."""
    if execution.seq >= EVENTS_MAX:
        return f"its journal has reached {EVENTS_MAX} events: split the workflow"
    if len(execution.steps) >= STARTED_MAX:
        return f"it has started {STARTED_MAX} steps, inner ones counted: split the workflow"
    return None


def _rest(
    execution: Execution, workflow: Workflow, now_ms: int, evaluate: Evaluate
) -> tuple[Event, ...]:
    """Nothing starts: wait for reports, park, or end."""
    live = execution.live_steps
    if any(
        execution.steps[path].status is StepStatus.RUNNING and not is_composite(workflow, path)
        for path in live
    ):
        return ()
    if live:
        wake_at_ms = next_wake_ms(execution)
        assert wake_at_ms is not None, "a composite has a live inner step"
        return (ExecutionParked(now_ms, wake_at_ms),)
    try:
        return (ExecutionCompleted(now_ms, _output(execution, workflow, evaluate)),)
    except StepFailedError as error:
        return (ExecutionFailed(now_ms, f"output: {error}", ErrorCode.STEP_FAILED),)


def _output(execution: Execution, workflow: Workflow, evaluate: Evaluate) -> JsonValue:
    if not workflow.has_output:
        return execution.steps[workflow.steps[-1].id].output
    scope = scope_of(execution, workflow)
    return render(workflow.output, lambda text: evaluate(text, scope))

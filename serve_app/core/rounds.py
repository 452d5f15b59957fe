"""One round of decisions on one state: which steps start, which blocks open, which composites end.

Owns what follows from steps that changed, in their blocks and in the composites around them. Awaits
nothing and reads no clock. Invariant: no event of a round depends on another one's being folded.
"""

from collections.abc import Collection

from serve_app.core.blocks import (
    LIVE_MAX,
    MAP_ITEMS_MAX,
    blocks_to_examine,
    concurrency,
    failed_steps,
    failure_of,
    goes_on_without,
    is_composite,
    is_running,
    is_started,
    live_under,
    outgrowth,
    output_of,
    rounds_max,
    started_count,
)
from serve_app.core.errors import ErrorCode, StepFailedError
from serve_app.core.execution import (
    Event,
    Execution,
    MapOpened,
    StepCompleted,
    StepFailed,
    StepSkipped,
    StepStarted,
    StepStatus,
)
from serve_app.core.inference import NO_USAGE, Usage
from serve_app.core.scope import (
    FINISHED,
    Evaluate,
    Scope,
    composite_of,
    in_block,
    scope_after_round,
    scope_of,
)
from serve_app.core.template import render
from serve_app.core.tools import has_answered, steps_to_start
from serve_app.core.waits import ended_waits, is_over
from serve_app.core.workflow import Step, Workflow, ready_steps


class Round:
    """One round of decisions on one state; `_events` has what was decided so far."""

    def __init__(
        self,
        execution: Execution,
        workflow: Workflow,
        now_ms: int,
        evaluate: Evaluate,
        result_bytes_max: int,
    ) -> None:
        self._result_bytes_max = result_bytes_max
        self._execution = execution
        self._workflow = workflow
        self._now_ms = now_ms
        self._evaluate = evaluate
        self._events: list[Event] = []
        self._cut: set[str] = set()
        self._at_work: set[str] = set()  # blocks that got an event in this round
        self._failed: list[str] = []  # blocks and composites that failed in this round

    def events(self, touched: Collection[str] | None) -> tuple[Event, ...]:
        """What is due; `touched` as in `due_events`."""
        if touched is None or touched:
            self._follow(touched)
        self._start_retries()
        self._end_waits()
        return tuple(self._events)

    def _follow(self, touched: Collection[str] | None) -> None:
        """What follows from changed steps, in their blocks and their composites."""
        execution, workflow = self._execution, self._workflow
        live = execution.live_steps
        for path, ended in failed_steps(execution, workflow, touched):
            self._fail(path, ended)
        composites: dict[str, None] = {}
        for path in live if touched is None else touched:
            if path in live and is_composite(workflow, path):
                composites[path] = None
        for block in blocks_to_examine(execution, workflow, touched):
            if not block:
                self._start_ready(block)
            elif not self._is_over(composite_of(block)):
                self._start_ready(block)
                composites[composite_of(block)] = None
        for composite in composites:
            if not self._is_over(composite):
                self._advance(composite)

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
        if not goes_on_without(self._workflow, path):
            error = failure_of(path, self._execution.steps[path])
            self._cut.add(ended)
            self._events.append(StepFailed(self._now_ms, ended, error, ErrorCode.STEP_FAILED))

    def _start_ready(self, block: str) -> None:
        """Start the steps of a block whose needs are done."""
        steps = steps_to_start(self._execution, self._workflow, block)
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
            case "generate":
                self._advance_turns(composite, step)
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

    def _advance_turns(self, composite: str, step: Step) -> None:
        """The next turn of a model with tools, unless the last one was its answer."""
        if self._open_count(composite):
            return
        rounds = started_count(self._execution, self._workflow, composite)
        if rounds and has_answered(self._execution, f"{composite}/{rounds - 1}", step):
            self._complete(composite)
        else:
            self._start_ready(f"{composite}/{rounds}")

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
        # Looked at whenever the count of items doubles, so that a list too long for its results is
        # not gone through to the end, and looking costs in all no more than looking at its end.
        if (started + opened).bit_length() > started.bit_length() and self._outgrowth(composite):
            if not open_count:
                self._complete(composite)
            return
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

    def _outgrowth(self, composite: str) -> str | None:
        return outgrowth(self._execution, self._workflow, composite, self._result_bytes_max)

    def _complete(self, composite: str) -> None:
        is_sum = self._workflow.step(composite).type in ("map", "parallel")
        if is_sum and (error := self._outgrowth(composite)) is not None:
            self._events.append(StepFailed(self._now_ms, composite, error, ErrorCode.STEP_FAILED))
            return
        output = output_of(self._execution, self._workflow, composite)
        self._events.append(StepCompleted(self._now_ms, composite, output))

    def _start_retries(self) -> None:
        for path in self._execution.live_steps:
            state = self._execution.steps[path]
            is_due = state.status is StepStatus.RETRYING and is_over(state, self._now_ms)
            if is_due and not self._has_failed(path):
                self._events.append(StepStarted(self._now_ms, path, state.attempt))

    def _end_waits(self) -> None:
        waits = ended_waits(self._execution, self._workflow, self._now_ms, self._evaluate)
        for path, events in waits:
            if not self._has_failed(path):
                self._events.extend(events)


def cut_off(path: str, code: str, now_ms: int, usage: Usage | None = None) -> StepFailed:
    """The end of a step that was aborted."""
    return StepFailed(now_ms, path, "aborted", code, usage or NO_USAGE)

"""Whatever happens in whatever order, an execution ends once, and its journal tells all of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from serve_app.adapters.event_codec import (
    changed_fields,
    decode_event,
    decode_snapshot,
    encode_event,
)
from serve_app.core.blocks import is_composite
from serve_app.core.decisions import (
    ChunkArrived,
    StepErrored,
    StepFinished,
    cancel,
    receive,
    record,
    take_over,
)
from serve_app.core.due import due_events, next_wake_ms
from serve_app.core.execution import (
    STEP_EVENTS,
    TERMINAL,
    Event,
    Execution,
    ExecutionCreated,
    Status,
    StepCompleted,
    StepStarted,
    StepStatus,
    StepWaiting,
    Wait,
    WaitKind,
    new_execution,
)
from serve_app.core.inference import Usage
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.core.workflow import COMPOSITES, Block, Step, Workflow
from tests.support.workflows import CREATED, EXECUTION_ID, T0, a_step, a_workflow, evaluate, folded

STEP_IDS = ("a", "b", "c", "d", "e")
CODES = ("STEP_FAILED", "INTERNAL", "CONNECTION_FAILED", "NO_HOSTS_AVAILABLE", "CANCELLED")
USAGE = Usage(3, 2, 1)
ROUNDS_MAX = 2_000  # to drain nested steps, each lost or retried a few times


@dataclass
class World:
    """One execution, its journal and its snapshot, moved by whoever wishes."""

    workflow: Workflow
    created: ExecutionCreated
    now_ms: int = T0
    journal: list[Event] = field(default_factory=list)
    snapshot: dict[str, bytes] = field(default_factory=dict)
    touched: set[str] | None = None

    def __post_init__(self) -> None:
        self.execution = new_execution(EXECUTION_ID, self.created)
        self.snapshot["created"] = encode_event(self.created)[1]

    def add(self, events: tuple[Event, ...]) -> None:
        before, self.execution = self.execution, folded(self.execution, events)
        self.journal.extend(events)
        for event in events:
            if not isinstance(event, STEP_EVENTS):
                self.touched = None
            elif self.touched is not None:
                self.touched.add(event.step_id)
        self.snapshot.update(changed_fields(before, self.execution, events))

    def settle(self) -> None:
        """Decide until nothing is due; naming what was touched must change no decision."""
        arguments = (self.workflow, self.now_ms, evaluate)
        touched = self.touched
        while due := due_events(self.execution, *arguments):
            hinted = due_events(self.execution, *arguments, touched)
            assert sorted(map(repr, hinted)) == sorted(map(repr, due))
            is_new = any(not isinstance(event, STEP_EVENTS) for event in due)
            touched = None if is_new else {event.step_id for event in due}
            self.add(due)
            for event in due:
                self.begin_wait(event)
        assert due_events(self.execution, *arguments, touched) == ()
        self.touched = set()

    def begin_wait(self, event: Event) -> None:
        """What the planner does for a step that waits, in the commit of its start."""
        if not isinstance(event, StepStarted) or self.workflow.step(event.step_id).type != "wait":
            return
        if self.execution.steps[event.step_id].status is StepStatus.RUNNING:
            kind = tuple(WaitKind)[len(self.journal) % 3]
            until_ms = self.now_ms + len(self.journal) % 7 * 500
            wait = Wait(kind, until_ms, "e" if kind is WaitKind.EVENT else None)
            self.add((StepWaiting(self.now_ms, event.step_id, wait),))

    @property
    def running(self) -> list[str]:
        """Steps under way: a composite has no task of its own."""
        return [
            path
            for path, step in self.execution.steps.items()
            if step.status is StepStatus.RUNNING and not is_composite(self.workflow, path)
        ]

    def check(self) -> None:
        """The journal and the snapshot, read back from bytes, both give the present state."""
        reread = (decode_event(*encode_event(event)) for event in self.journal)
        start = new_execution(EXECUTION_ID, self.created)
        assert folded(start, reread) == self.execution
        seq, status = str(self.execution.seq).encode(), self.execution.status.encode()
        fields = {**self.snapshot, "seq": seq, "status": status}
        assert decode_snapshot(EXECUTION_ID, fields) == self.execution


policies = st.builds(
    RetryPolicy,
    attempts=st.integers(0, 2),
    backoff=st.sampled_from(Backoff),
    max_delay_ms=st.integers(0, 500),
    initial_delay_ms=st.integers(0, 300),
)


CONDITIONS = ("true", "true", "false", "1", "input.none")


@st.composite
def blocks(draw: st.DrawFn, names: Iterator[str], depth: int) -> tuple[Step, ...]:
    """Steps of one list: each needs some of those before it, and may hold steps itself."""
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 3 if depth else len(STEP_IDS)))):
        needs = draw(st.sets(st.sampled_from([step.id for step in steps]))) if steps else ()
        step = a_step(
            next(names),
            needs=tuple(sorted(needs)),
            when=draw(st.sampled_from((None, None, None, "true", "false", "1", "input.none"))),
            retry=draw(st.none() | policies),
        )
        kind = draw(st.sampled_from(("work", "work", "wait", *COMPOSITES)))
        if kind == "wait":
            step = replace(step, type=kind, settings={"if": draw(st.sampled_from(CONDITIONS))})
        elif kind != "work" and depth < 2:
            step = replace(step, type=kind, retry=None, **draw(insides(kind, names, depth + 1)))
        steps.append(step)
    return tuple(steps)


@st.composite
def insides(draw: st.DrawFn, kind: str, names: Iterator[str], depth: int) -> dict[str, object]:
    """The settings and the blocks of a composite."""
    inner = blocks(names, depth)
    if kind == "parallel":
        keys = ("left", "right")[: draw(st.integers(1, 2))]
        return {"blocks": tuple(Block(key, draw(inner)) for key in keys)}
    if kind == "branch":
        conditions = draw(st.lists(st.sampled_from(CONDITIONS), min_size=1, max_size=2))
        cases = [Block(str(i), draw(inner), when) for i, when in enumerate(conditions)]
        last = [Block("else", draw(inner))] if draw(st.booleans()) else []
        return {"blocks": (*cases, *last)}
    if kind == "loop":
        while_ = draw(st.sampled_from(CONDITIONS))
        settings: dict[str, object] = {"while": while_, "maxRounds": draw(st.integers(1, 3))}
    else:
        settings = {
            "over": draw(st.sampled_from(("{{ input.list }}", [], [1, 2], "{{ input.none }}"))),
            "concurrency": draw(st.integers(1, 3)),
            "onError": draw(st.sampled_from(("fail", "skip"))),
        }
    return {"settings": settings, "blocks": (Block("", draw(inner)),)}


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    names = iter((*STEP_IDS, *(f"s{number}" for number in range(500))))
    steps = draw(blocks(names, 0))
    output = draw(st.sampled_from((None, "{{ input.name }}", "{{ input.none }}")))
    return a_workflow(*steps, **({} if output is None else {"output": output}))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    workflow = draw(workflows())
    step_ids = [step.id for step in workflow.steps]
    created = ExecutionCreated(
        at_ms=T0,
        workspace=CREATED.workspace,
        workflow_id="wf",
        workflow_version=1,
        input={"name": "Ada", "list": [1, 2, 3, 4]},
        timeout_ms=draw(st.none() | st.integers(1, 5_000)),
        retry=draw(policies),
        kept=draw(st.dictionaries(st.sampled_from(step_ids), st.integers(0, 9), max_size=2)),
    )
    return World(workflow, created)


def advance(world: World, draw: Callable[..., object]) -> None:
    world.now_ms += draw(st.integers(0, 2_000))


def report(world: World, draw: Callable[..., object]) -> None:
    """A running step reports, or a report comes of an attempt that is void or never was."""
    step_id = draw(st.sampled_from(world.running or STEP_IDS))
    state = world.execution.steps.get(step_id)
    attempt = (state.attempt if state else 1) + draw(st.sampled_from((0, 0, 0, 0, -1, 1)))
    fact = draw(
        st.sampled_from(
            (
                ChunkArrived(step_id, attempt, "text", (1, 2)),
                StepFinished(step_id, attempt, {"n": 1}, USAGE),
                *(StepErrored(step_id, attempt, "broke", code, True, USAGE) for code in CODES),
                StepErrored(step_id, attempt, "broke", "INVALID_PROMPT", False, USAGE),
            )
        )
    )
    world.add(record(world.execution, world.workflow, fact, world.now_ms, draw(jitters)))


def ask_to_cancel(world: World, draw: Callable[..., object]) -> None:
    if draw(st.integers(0, 3)) == 0 and not world.execution.is_terminal:
        world.add(cancel(world.execution, "enough", world.now_ms))


def send_signal(world: World, draw: Callable[..., object]) -> None:
    if not world.execution.is_terminal:
        name = draw(st.sampled_from(("e", *STEP_IDS)))
        world.add(receive(world.execution, name, draw(st.booleans()), world.now_ms))


def lose_worker(world: World, draw: Callable[..., object]) -> None:
    resumable = draw(st.sets(st.sampled_from(world.running or STEP_IDS)))
    world.add(take_over(world.execution, world.workflow, world.now_ms, resumable))


jitters = st.floats(0, 1, exclude_max=True)
MOVES = (advance, report, report, report, ask_to_cancel, send_signal, lose_worker)


def finish(world: World) -> None:
    """Let the owner do its work until the end: wake when it is time, let running steps finish."""
    for _ in range(ROUNDS_MAX):
        world.settle()
        if world.execution.is_terminal:
            return
        if running := world.running:
            done = StepFinished(running[0], world.execution.steps[running[0]].attempt, 1)
            world.add(record(world.execution, world.workflow, done, world.now_ms, 0.5))
        else:
            wakes = (world.execution.wake_at_ms, next_wake_ms(world.execution))
            world.now_ms = max(world.now_ms, min(wake for wake in wakes if wake is not None))
    raise AssertionError(f"no end in sight: {world.execution}")


@given(worlds(), st.data())
def test_any_history_leads_to_exactly_one_end_and_can_be_read_back(
    world: World, data: st.DataObject
) -> None:
    for move in data.draw(st.lists(st.sampled_from(MOVES), max_size=30)):
        if data.draw(st.booleans()):
            world.settle()  # or not: reports may pile up before the owner looks again
            assert_settled(world.execution, world.running)
        move(world, data.draw)
    world.check()
    finish(world)
    world.check()
    statuses = list(history(world))
    assert [status for status in statuses if status in TERMINAL] == [statuses[-1]]
    completed = [event.step_id for event in world.journal if isinstance(event, StepCompleted)]
    assert len(completed) == len(set(completed))
    assert due_events(world.execution, world.workflow, world.now_ms + 10**9, evaluate) == ()
    assert world.execution.attempt <= world.created.retry.attempts + 1


def assert_settled(execution: Execution, running: list[str]) -> None:
    """At rest it has ended, sleeps with a time to wake, or has a step at work.

    Where it has news it sleeps no more.
    """
    if execution.status is Status.WAITING:
        assert execution.wake_at_ms is not None
        assert not running
    elif not execution.is_terminal:
        assert execution.status is Status.RUNNING
        assert running


def history(world: World) -> list[Status]:
    """The status after each event."""
    state, statuses = new_execution(EXECUTION_ID, world.created), []
    for event in world.journal:
        state = folded(state, (event,))
        statuses.append(state.status)
    return statuses


@given(worlds(), st.data())
def test_the_same_arguments_give_the_same_decision(world: World, data: st.DataObject) -> None:
    for move in data.draw(st.lists(st.sampled_from(MOVES), max_size=10)):
        move(world, data.draw)
        arguments = (world.execution, world.workflow, world.now_ms, evaluate)
        assert due_events(*arguments) == due_events(*arguments)
        world.settle()

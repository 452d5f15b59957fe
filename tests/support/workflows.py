"""Small workflows, executions and one event of each kind, for tests of the core."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from serve_app.core.errors import StepFailedError
from serve_app.core.execution import (
    CancelRequested,
    ChunkEmitted,
    Event,
    Execution,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionCreated,
    ExecutionFailed,
    ExecutionParked,
    ExecutionResumed,
    ExecutionStarted,
    GateAnswered,
    MapOpened,
    SignalReceived,
    SignalTaken,
    StepCompleted,
    StepFailed,
    StepProgressed,
    StepResumed,
    StepRetrying,
    StepSkipped,
    StepStarted,
    StepWaiting,
    Wait,
    WaitKind,
    evolve,
    new_execution,
)
from serve_app.core.gates import Verdict
from serve_app.core.inference import JsonValue, Resumed, Usage
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.core.workflow import Step, Workflow

T0 = 1_800_000_000_000
EXECUTION_ID = "exe_00test"
CREATED = ExecutionCreated(
    at_ms=T0,
    workspace="w1",
    workflow_id="wf",
    workflow_version=3,
    input={"name": "Ada"},
    metadata={"ticket": 7},
    user_id="u1",
)
FIXED = RetryPolicy(attempts=2, backoff=Backoff.FIXED, initial_delay_ms=100)


def a_step(step_id: str, kind: str = "work", **members: object) -> Step:
    """A step that needs nothing, unless `members` say otherwise."""
    return Step(**{"id": step_id, "type": kind, "settings": {}, **members})


def a_workflow(*steps: Step, **members: object) -> Workflow:
    """A workflow of these steps; `output` given: it has one."""
    defaults: dict[str, object] = {
        "id": "wf",
        "description": "",
        "input_schema": None,
        "output": None,
        "has_output": "output" in members,
        "timeout_ms": None,
        "retry": RetryPolicy(),
        "steps": steps,
        "document": {},
    }
    return Workflow(**{**defaults, **members})


def a_chain(*steps: Step) -> tuple[Step, ...]:
    """The same steps, each of which needs the one before it."""
    needs = [(), *((step.id,) for step in steps[:-1])]
    return tuple(replace(step, needs=need) for step, need in zip(steps, needs, strict=True))


def an_execution(*events: Event, **created: object) -> Execution:
    """The state after `created` and these events."""
    return folded(new_execution(EXECUTION_ID, replace(CREATED, **created)), events)


def folded(execution: Execution, events: Iterable[Event]) -> Execution:
    """The state after these events."""
    for event in events:
        execution = evolve(execution, event)
    return execution


def evaluate(text: str, scope: Mapping[str, object]) -> object:
    """A toy of an expression language: `true`, `false`, a whole number, or a dotted path."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    if text.isdigit():
        return int(text)
    value: object = scope
    for name in text.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise StepFailedError(f"no such key: {name}", False)
        value = value[name]
    return value


class ToyExpressions:
    """`ports.Expressions` over `evaluate`."""

    def check(self, text: str) -> str | None:
        return None

    def evaluate(self, text: str, scope: Mapping[str, object]) -> object:
        return evaluate(text, scope)


class ToyEntropy:
    """`ports.Entropy` without chance: the plain delay, and counted tokens."""

    count = 0

    def uniform(self) -> float:
        return 0.5

    def token(self) -> str:
        self.count += 1
        return f"token{self.count}"


OUTPUT: JsonValue = {"answer": [1, 2.5, True, None, "héllo"]}
USAGE = Usage(prompt_tokens=5, completion_tokens=7, cached_tokens=2)

# Of steps: `ran` is running in the state a test makes, `new` has not started.
EXAMPLES: Mapping[type[Event], Event] = {
    type(event): event
    for event in (
        CREATED,
        GateAnswered(T0 + 5, Verdict.PASSED),
        ExecutionStarted(T0 + 10),
        StepStarted(T0 + 20, "new", 1),
        MapOpened(T0 + 25, "ran", (1, {"two": 2})),
        StepWaiting(T0 + 26, "ran", Wait(WaitKind.EVENT, T0 + 500, "paid", "who pays?")),
        SignalReceived(T0 + 27, "paid", OUTPUT),
        SignalTaken(T0 + 28, "ran", 4),
        StepProgressed(T0 + 29, "ran", 37.5, "reading"),
        ChunkEmitted(T0 + 30, "ran", "hi", (1, 2)),
        StepResumed(T0 + 35, "ran"),
        StepCompleted(T0 + 40, "ran", OUTPUT, USAGE, Resumed.APPROXIMATE),
        StepSkipped(T0 + 50, "new"),
        StepRetrying(T0 + 60, "ran", 2, 1, T0 + 1060, "it broke", USAGE),
        StepFailed(T0 + 70, "ran", "it broke", "STEP_FAILED", USAGE),
        ExecutionParked(T0 + 80, T0 + 1080),
        ExecutionResumed(T0 + 90),
        CancelRequested(T0 + 100, "by the caller"),
        ExecutionCompleted(T0 + 110, OUTPUT),
        ExecutionFailed(T0 + 120, "step ran: it broke", "STEP_FAILED"),
        ExecutionCancelled(T0 + 130, "by the caller"),
    )
}

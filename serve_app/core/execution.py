"""One execution: its events, its state, and the table of what may follow what.

Longer than 400 lines because an event and what it does to the state are read together.

Owns the persisted event names and `evolve`, the fold that turns a journal into a state. Decides
nothing (`decisions.py` does) and knows no store. Invariant: `evolve` is the only way a state
changes, and an event without a row in `TRANSITIONS` for the present status is refused. Names in
`KINDS` are in journals on disk: never rename one, never change a member's meaning.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import get_args

from serve_app.core.errors import IllegalTransitionError
from serve_app.core.gates import Gate, TokenShare, Verdict
from serve_app.core.inference import NO_USAGE, JsonValue, Resumed, Usage
from serve_app.core.origin import Origin, Refusal
from serve_app.core.retry import RetryPolicy

NO_RETRY = RetryPolicy()


class Status(StrEnum):
    """Where an execution stands."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


class StepStatus(StrEnum):
    """Where a step stands; a step that was never started has no state."""

    RUNNING = "running"
    RETRYING = "retrying"
    WAITING = "waiting"
    COMPLETED = "completed"
    SKIPPED = "skipped"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class ExecutionCreated:
    """Accepted: everything the caller asked for, and the rules it will run under.

    Args:
        timeout_ms: from acceptance, queue included; None: no deadline.
        retry: the tries after the first, of the execution as a whole.
        priority: -100 to 100; higher runs first.
        request_hash: of the body that came with an Idempotency-Key, to tell a repeat from a
            conflict.
        kept: outputs of steps that a retry takes from the execution it retries.
        key_id: of the key that asked, for the usage ledger; never the key.
        mode: how its caller asked for it: `async`, `sync` or `stream`.
        gates: what it must pass before it starts, in order.
        parent: the execution whose step waits for this one.
        depth: how many parents there are above it.
        trigger: what started it, where nobody's call did.
        refusal: it ends with this instead of running.
        cancel_on: names of the events that may cancel it; the definition has their conditions.
        hops: how many executions in a row were started by events, up to it.
        tokens: what it took from its workflow's rate of tokens.
    """

    at_ms: int
    workspace: str
    workflow_id: str
    workflow_version: int
    input: JsonValue
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)
    user_id: str | None = None
    timeout_ms: int | None = None
    retry: RetryPolicy = NO_RETRY
    priority: int = 0
    retry_of: str | None = None
    request_hash: str | None = None
    kept: Mapping[str, JsonValue] = field(default_factory=dict)
    key_id: str | None = None
    mode: str = "async"
    gates: tuple[Gate, ...] = ()
    parent: str | None = None
    depth: int = 0
    trigger: Origin | None = None
    refusal: Refusal | None = None
    cancel_on: tuple[str, ...] = ()
    hops: int = 0
    tokens: TokenShare | None = None

    @property
    def deadline_ms(self) -> int | None:
        """Unix epoch, or None."""
        return None if self.timeout_ms is None else self.at_ms + self.timeout_ms


@dataclass(frozen=True, slots=True)
class GateAnswered:
    """The last of its gates let it through, handed it the result of another, or refused it."""

    at_ms: int
    verdict: Verdict
    value: JsonValue = None


@dataclass(frozen=True, slots=True)
class ExecutionStarted:
    """Its first worker began."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class StepStarted:
    """An attempt of a step began; `attempt` counts all attempts of the step, from 1."""

    at_ms: int
    step_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class MapOpened:
    """What a map's `over` gave; each item gets a run of its steps, under the item's index."""

    at_ms: int
    step_id: str
    items: tuple[JsonValue, ...]


class WaitKind(StrEnum):
    """What a waiting step waits for; all end by their time too."""

    TIME = "time"
    APPROVAL = "approval"
    EVENT = "event"
    CHILD = "child"


@dataclass(frozen=True, slots=True)
class Wait:
    """What a step waits for; persisted.

    Args:
        until_ms: when it ends by itself.
        event: the name of the event that answers it, beside the step's own; the child's id.
        message: for whoever shall answer; the child's workflow.
    """

    kind: WaitKind
    until_ms: int
    event: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class StepWaiting:
    """A started step waits: it has no task, and alone keeps no worker."""

    at_ms: int
    step_id: str
    wait: Wait


@dataclass(frozen=True, slots=True)
class SignalReceived:
    """Somebody sent a signal, or an event came; it is kept until a step takes it.

    `path` names the one step that an event is for, which waits for it.
    """

    at_ms: int
    name: str
    data: JsonValue
    path: str | None = None


@dataclass(frozen=True, slots=True)
class SignalTaken:
    """A waiting step takes a signal, by its sequence number; the step's result follows."""

    at_ms: int
    step_id: str
    seq: int


@dataclass(frozen=True, slots=True)
class StepProgressed:
    """A step says how far the execution is: 0 to 100, in its own opinion."""

    at_ms: int
    step_id: str
    progress: float
    message: str


@dataclass(frozen=True, slots=True)
class ChunkEmitted:
    """Text that a running step produced since its last chunk, with the ids behind it."""

    at_ms: int
    step_id: str
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResumed:
    """Another worker goes on with the attempt, behind the chunks that are in the journal."""

    at_ms: int
    step_id: str


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """The step's result, recorded once; `resumed` where its answer lost a replica or a worker."""

    at_ms: int
    step_id: str
    output: JsonValue
    usage: Usage = NO_USAGE
    resumed: Resumed | None = None


@dataclass(frozen=True, slots=True)
class StepSkipped:
    """Its `when` was false; its output is null."""

    at_ms: int
    step_id: str


@dataclass(frozen=True, slots=True)
class StepRetrying:
    """The attempt under way is void, its chunks too; the next one starts at `wake_at_ms`.

    A worker that took over repeats the *same* attempt number: its death is not the user's retry,
    and the step's idempotency key stays. `execution_attempt` grows when the execution's own
    retry policy, not the step's, grants the next try.
    """

    at_ms: int
    step_id: str
    attempt: int
    execution_attempt: int
    wake_at_ms: int
    error: str
    usage: Usage = NO_USAGE


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step's last attempt failed, or was cut off; the execution ends with it."""

    at_ms: int
    step_id: str
    error: str
    error_code: str
    usage: Usage = NO_USAGE


@dataclass(frozen=True, slots=True)
class ExecutionParked:
    """Nothing to do before `wake_at_ms`; it has no owner meanwhile."""

    at_ms: int
    wake_at_ms: int


@dataclass(frozen=True, slots=True)
class ExecutionResumed:
    """A worker took it up again."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody wants it stopped; the owner ends it."""

    at_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class ExecutionCompleted:
    """Terminal: it has its result."""

    at_ms: int
    data: JsonValue


@dataclass(frozen=True, slots=True)
class ExecutionFailed:
    """Terminal: it has an error."""

    at_ms: int
    error: str
    error_code: str


@dataclass(frozen=True, slots=True)
class ExecutionCancelled:
    """Terminal: stopped on request."""

    at_ms: int
    error: str


Event = (
    ExecutionCreated
    | GateAnswered
    | ExecutionStarted
    | StepStarted
    | MapOpened
    | StepWaiting
    | SignalReceived
    | SignalTaken
    | StepProgressed
    | ChunkEmitted
    | StepResumed
    | StepCompleted
    | StepSkipped
    | StepRetrying
    | StepFailed
    | ExecutionParked
    | ExecutionResumed
    | CancelRequested
    | ExecutionCompleted
    | ExecutionFailed
    | ExecutionCancelled
)

KINDS: Mapping[str, type[Event]] = MappingProxyType(
    {
        "execution.created": ExecutionCreated,
        "gate.answered": GateAnswered,
        "execution.started": ExecutionStarted,
        "step.started": StepStarted,
        "map.opened": MapOpened,
        "step.waiting": StepWaiting,
        "signal.received": SignalReceived,
        "signal.taken": SignalTaken,
        "step.progress": StepProgressed,
        "chunk": ChunkEmitted,
        "step.resumed": StepResumed,
        "step.completed": StepCompleted,
        "step.skipped": StepSkipped,
        "step.retrying": StepRetrying,
        "step.failed": StepFailed,
        "execution.parked": ExecutionParked,
        "execution.resumed": ExecutionResumed,
        "cancel.requested": CancelRequested,
        "execution.completed": ExecutionCompleted,
        "execution.failed": ExecutionFailed,
        "execution.cancelled": ExecutionCancelled,
    }
)
KIND_OF: Mapping[type[Event], str] = MappingProxyType({cls: kind for kind, cls in KINDS.items()})

StepEvent = (
    StepStarted
    | MapOpened
    | StepWaiting
    | ChunkEmitted
    | StepResumed
    | StepCompleted
    | StepSkipped
    | StepRetrying
    | StepFailed
)
STEP_EVENTS = get_args(StepEvent)

TRANSITIONS: Mapping[tuple[Status, type[Event]], Status] = MappingProxyType(
    {
        (Status.PENDING, GateAnswered): Status.PENDING,
        (Status.PENDING, ExecutionStarted): Status.RUNNING,
        (Status.PENDING, CancelRequested): Status.CANCELLING,
        (Status.PENDING, ExecutionFailed): Status.FAILED,
        **{(Status.RUNNING, cls): Status.RUNNING for cls in STEP_EVENTS},
        (Status.RUNNING, SignalTaken): Status.RUNNING,
        (Status.RUNNING, StepProgressed): Status.RUNNING,
        **{(status, SignalReceived): status for status in Status if status not in TERMINAL},
        (Status.RUNNING, ExecutionParked): Status.WAITING,
        (Status.RUNNING, CancelRequested): Status.CANCELLING,
        (Status.RUNNING, ExecutionCompleted): Status.COMPLETED,
        (Status.RUNNING, ExecutionFailed): Status.FAILED,
        (Status.WAITING, ExecutionResumed): Status.RUNNING,
        (Status.WAITING, CancelRequested): Status.CANCELLING,
        (Status.WAITING, ExecutionFailed): Status.FAILED,
        (Status.CANCELLING, ChunkEmitted): Status.CANCELLING,
        (Status.CANCELLING, StepFailed): Status.CANCELLING,
        (Status.CANCELLING, ExecutionCancelled): Status.CANCELLED,
    }
)


@dataclass(frozen=True, slots=True)
class StepState:
    """One started step, or one run of an inner step.

    Args:
        attempt: attempts so far, over all tries of the execution.
        tries: attempts within the present try of the execution; the step's own policy counts
            these.
        wake_at_ms: set while `retrying` or `waiting`.
        usage: summed over attempts, failed ones included.
        losses: times its worker or replica was lost under it.
        wasted_tokens: the part of `usage` that went into attempts without a result.
        items: of a map that runs, what it runs over.
        wait: of a step that waits, or waited.
        began_seq: of the event that started the present attempt; 0: not known.
        resumed: how its answer went on after a loss; None: there was none.
    """

    status: StepStatus
    attempt: int
    tries: int
    started_at_ms: int
    completed_at_ms: int | None = None
    output: JsonValue = None
    error: str | None = None
    usage: Usage = NO_USAGE
    wake_at_ms: int | None = None
    losses: int = 0
    wasted_tokens: int = 0
    items: tuple[JsonValue, ...] | None = None
    wait: Wait | None = None
    began_seq: int = 0
    resumed: Resumed | None = None


LIVE = frozenset({StepStatus.RUNNING, StepStatus.RETRYING, StepStatus.WAITING})  # begun, not ended
_AT_WORK = frozenset({StepStatus.RUNNING, StepStatus.WAITING})


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal that no step has taken yet; `seq` is that of its event, `path` as there."""

    seq: int
    name: str
    data: JsonValue
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Execution:
    """The fold of a journal up to and including event `seq`.

    Args:
        steps: by id; an inner step's is a path, `each/3/fetch`: its composite's id, its block's
            key, its own id.
        live: ids of the steps in `LIVE`, in the order they started; follows from `steps`, and is
            kept so that a decision need not look at thousands of finished items. None: find them.
        signals: those no step has taken yet, oldest first.
        progress: what a step last said, 0 to 100; None: nothing yet.
        failed: the first step outside of any composite that failed; likewise.
        verdict: of its gates; None while it is before one, or has none.
    """

    id: str
    seq: int
    status: Status
    created: ExecutionCreated
    attempt: int = 1
    started_at_ms: int | None = None
    completed_at_ms: int | None = None
    wake_at_ms: int | None = None
    cancel_reason: str | None = None
    data: JsonValue = None
    error: str | None = None
    error_code: str | None = None
    steps: Mapping[str, StepState] = field(default_factory=dict)
    signals: tuple[Signal, ...] = ()
    progress: float | None = None
    live: Mapping[str, None] | None = field(default=None, compare=False, repr=False)
    failed: str | None = field(default=None, compare=False, repr=False)
    verdict: Verdict | None = None

    def __post_init__(self) -> None:
        if self.live is None:
            object.__setattr__(self, "live", dict.fromkeys(_in_status(self.steps, LIVE)))
            failed = _in_status(self.steps, frozenset({StepStatus.FAILED}))
            object.__setattr__(self, "failed", next((i for i in failed if "/" not in i), None))

    @property
    def live_steps(self) -> Collection[str]:
        """Ids of the steps that have started and not ended, in the order they started."""
        return self.live or ()

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended; no event can follow."""
        return self.status in TERMINAL

    @property
    def is_at_gate(self) -> bool:
        """Whether a gate has yet to answer."""
        return bool(self.created.gates) and self.verdict is None

    @property
    def usage(self) -> Usage:
        """Tokens of all steps and attempts."""
        return sum((step.usage for step in self.steps.values()), Usage())

    @property
    def wasted_tokens(self) -> int:
        """The part of `usage` that went into attempts without a result."""
        return sum(step.wasted_tokens for step in self.steps.values())


def new_execution(execution_id: str, created: ExecutionCreated) -> Execution:
    """The state after the first event of a journal, which has sequence number 1."""
    at_ms = created.at_ms
    kept = {
        step_id: StepState(StepStatus.COMPLETED, 0, 0, at_ms, at_ms, output)
        for step_id, output in created.kept.items()
    }
    return Execution(execution_id, seq=1, status=Status.PENDING, created=created, steps=kept)


def evolve(execution: Execution, event: Event) -> Execution:
    """Return the state after one more event.

    Raises:
        IllegalTransitionError: the event cannot follow the present status or step status.
    """
    folding = Folding(execution)
    folding.add(event)
    return folding.execution


class Folding:
    """A fold of many events that copies the table of steps once.

    The states it gives share that table: each is good until the next event is added.
    """

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._steps: dict[str, StepState] = {}
        self._live: dict[str, None] = {}

    @property
    def execution(self) -> Execution:
        """The state after all events so far."""
        return self._execution

    def add(self, event: Event) -> None:
        """Take one more event. Raises as `evolve`."""
        execution = self._execution
        status = TRANSITIONS.get((execution.status, type(event)))
        if status is None:
            raise IllegalTransitionError(
                f"{type(event).__name__} cannot follow {execution.status} in {execution.id}"
            )
        if not isinstance(event, STEP_EVENTS):
            moved = _moved(execution, status, execution.steps, execution.live)
            self._execution = _with_execution(moved, event)
            return
        step = _step_after(execution, event)
        if not self._steps:
            self._steps = dict(execution.steps)
            self._live = dict.fromkeys(execution.live_steps)
        self._put(event.step_id, step)
        moved = _moved(execution, status, self._steps, self._live)
        if isinstance(event, StepRetrying):
            moved = replace(moved, attempt=event.execution_attempt)
        elif step.status is StepStatus.FAILED and moved.failed is None and "/" not in event.step_id:
            moved = replace(moved, failed=event.step_id)
        self._execution = moved

    def _put(self, step_id: str, step: StepState) -> None:
        self._steps[step_id] = step
        if step.status in LIVE:
            self._live[step_id] = None
        else:
            self._live.pop(step_id, None)


def _moved(
    execution: Execution,
    status: Status,
    steps: Mapping[str, StepState],
    live: Mapping[str, None] | None,
) -> Execution:
    """One event on; spelled out, because `replace` takes four times as long for every event."""
    return Execution(
        execution.id,
        execution.seq + 1,
        status,
        execution.created,
        execution.attempt,
        execution.started_at_ms,
        execution.completed_at_ms,
        execution.wake_at_ms,
        execution.cancel_reason,
        execution.data,
        execution.error,
        execution.error_code,
        steps,
        execution.signals,
        execution.progress,
        live,
        execution.failed,
        execution.verdict,
    )


def _in_status(steps: Mapping[str, StepState], wanted: Collection[StepStatus]) -> Iterator[str]:
    return (step_id for step_id, step in steps.items() if step.status in wanted)


def _with_execution(execution: Execution, event: Event) -> Execution:  # noqa: C901, PLR0911 - one return per event
    match event:
        case GateAnswered(verdict=verdict, value=value):
            return replace(execution, verdict=verdict, data=value)
        case ExecutionStarted(at_ms=at_ms):
            return replace(execution, started_at_ms=at_ms)
        case ExecutionParked(wake_at_ms=wake_at_ms):
            return replace(execution, wake_at_ms=wake_at_ms)
        case ExecutionResumed():
            return replace(execution, wake_at_ms=None)
        case SignalReceived(name=name, data=data, path=path):
            # Who is parked looks at once, by whichever clock.
            wake_ms = 0 if execution.status is Status.WAITING else execution.wake_at_ms
            signals = (*execution.signals, Signal(execution.seq, name, data, path))
            return replace(execution, signals=signals, wake_at_ms=wake_ms)
        case StepProgressed(progress=progress):
            return replace(execution, progress=progress)
        case SignalTaken(seq=seq):
            left = tuple(signal for signal in execution.signals if signal.seq != seq)
            return replace(execution, signals=left)
        case CancelRequested(reason=reason):
            # A result that its gate handed over is dropped with it.
            return replace(execution, cancel_reason=reason, wake_at_ms=None, data=None)
        case ExecutionCompleted(at_ms=at_ms, data=data):
            return replace(execution, completed_at_ms=at_ms, data=data)
        case ExecutionFailed(at_ms=at_ms, error=error, error_code=code):
            return replace(
                execution,
                completed_at_ms=at_ms,
                wake_at_ms=None,
                data=None,
                error=error,
                error_code=code,
            )
        case ExecutionCancelled(at_ms=at_ms, error=error):
            return replace(execution, completed_at_ms=at_ms, error=error, error_code="CANCELLED")
        case _:
            raise IllegalTransitionError(f"{type(event).__name__} is no event of an execution")


def _step_after(execution: Execution, event: StepEvent) -> StepState:  # noqa: C901, PLR0911 - one return per event
    match event:
        case StepStarted():
            return _started(execution, event)
        case MapOpened(step_id=step_id, items=items):
            return replace(_live(execution, step_id), items=items)
        case StepWaiting(step_id=step_id, wait=wait):
            step = _live(execution, step_id)
            until_ms = wait.until_ms
            return replace(step, status=StepStatus.WAITING, wait=wait, wake_at_ms=until_ms)
        case StepSkipped(at_ms=at_ms, step_id=step_id):
            if step_id in execution.steps:
                raise IllegalTransitionError(f"step {step_id} has started, it cannot be skipped")
            return StepState(StepStatus.SKIPPED, 0, 0, at_ms, at_ms)
        case ChunkEmitted(step_id=step_id):
            return _live(execution, step_id)
        case StepResumed(step_id=step_id):
            step = _live(execution, step_id)
            return replace(step, losses=step.losses + 1)
        case StepCompleted(at_ms=at_ms, step_id=step_id, output=output, usage=usage):
            step = _live(execution, step_id, _AT_WORK)
            return replace(
                step,
                status=StepStatus.COMPLETED,
                completed_at_ms=at_ms,
                output=output,
                error=None,
                usage=step.usage + usage,
                wake_at_ms=None,
                items=None,  # they are in the journal; nothing asks for them any more
                resumed=event.resumed,
            )
        case StepRetrying():
            return _retrying(execution, event)
        case StepFailed(at_ms=at_ms, step_id=step_id, error=error, error_code=code, usage=usage):
            step = _live(execution, step_id, LIVE)
            return replace(
                step,
                status=StepStatus.CANCELLED if code == "CANCELLED" else StepStatus.FAILED,
                completed_at_ms=at_ms,
                error=error,
                usage=step.usage + usage,
                wasted_tokens=step.wasted_tokens + usage.total_tokens,
                wake_at_ms=None,
            )


def _started(execution: Execution, event: StepStarted) -> StepState:
    before = execution.steps.get(event.step_id)
    seq = execution.seq + 1
    if before is None:
        return StepState(StepStatus.RUNNING, event.attempt, 1, event.at_ms, began_seq=seq)
    if before.status is not StepStatus.RETRYING:
        raise IllegalTransitionError(f"step {event.step_id} is {before.status}, it cannot start")
    return replace(
        before, status=StepStatus.RUNNING, attempt=event.attempt, wake_at_ms=None, began_seq=seq
    )


def _retrying(execution: Execution, event: StepRetrying) -> StepState:
    step = _live(execution, event.step_id, _AT_WORK)
    is_execution_retry = event.execution_attempt > execution.attempt
    is_new_attempt = event.attempt > step.attempt
    tries = 1 if is_execution_retry else step.tries + is_new_attempt
    return replace(
        step,
        status=StepStatus.RETRYING,
        tries=tries,
        error=event.error,
        usage=step.usage + event.usage,
        wasted_tokens=step.wasted_tokens + event.usage.total_tokens,
        attempt=event.attempt,
        wake_at_ms=event.wake_at_ms,
        wait=None,
        losses=step.losses + (not is_new_attempt),
    )


def _live(
    execution: Execution, step_id: str, allowed: Collection[StepStatus] = (StepStatus.RUNNING,)
) -> StepState:
    step = execution.steps.get(step_id)
    if step is None or step.status not in allowed:
        status = "not started" if step is None else step.status
        raise IllegalTransitionError(f"step {step_id} of {execution.id} is {status}, not running")
    return step

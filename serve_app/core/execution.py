"""One execution: its events, its state, and the table of what may follow what.

Longer than 400 lines because an event and what it does to the state are read together.

Owns the persisted event names and `evolve`, the fold that turns a journal into a state. Decides
nothing (`decisions.py` does) and knows no store. Invariant: `evolve` is the only way a state
changes, and an event without a row in `TRANSITIONS` for the present status is refused. Names in
`KINDS` are in journals on disk: never rename one, never change a member's meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from serve_app.core.errors import IllegalTransitionError
from serve_app.core.inference import NO_USAGE, JsonValue, Usage
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

    @property
    def deadline_ms(self) -> int | None:
        """Unix epoch, or None."""
        return None if self.timeout_ms is None else self.at_ms + self.timeout_ms


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
class ChunkEmitted:
    """Text that a running step produced since its last chunk, with the ids behind it."""

    at_ms: int
    step_id: str
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """The step's result, recorded once."""

    at_ms: int
    step_id: str
    output: JsonValue
    usage: Usage = NO_USAGE


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
    | ExecutionStarted
    | StepStarted
    | ChunkEmitted
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
        "execution.started": ExecutionStarted,
        "step.started": StepStarted,
        "chunk": ChunkEmitted,
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

_STEP_EVENTS = (StepStarted, ChunkEmitted, StepCompleted, StepSkipped, StepRetrying, StepFailed)

TRANSITIONS: Mapping[tuple[Status, type[Event]], Status] = MappingProxyType(
    {
        (Status.PENDING, ExecutionStarted): Status.RUNNING,
        (Status.PENDING, CancelRequested): Status.CANCELLING,
        (Status.PENDING, ExecutionFailed): Status.FAILED,
        **{(Status.RUNNING, cls): Status.RUNNING for cls in _STEP_EVENTS},
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
    """One started step.

    Args:
        attempt: attempts so far, over all tries of the execution.
        tries: attempts within the present try of the execution; the step's own policy counts
            these.
        wake_at_ms: set while `retrying`.
        usage: summed over attempts, failed ones included.
        losses: times its worker or replica was lost under it.
        wasted_tokens: the part of `usage` that went into attempts without a result.
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


@dataclass(frozen=True, slots=True)
class Execution:
    """The fold of a journal up to and including event `seq`."""

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

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended; no event can follow."""
        return self.status in TERMINAL

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
    status = TRANSITIONS.get((execution.status, type(event)))
    if status is None:
        raise IllegalTransitionError(
            f"{type(event).__name__} cannot follow {execution.status} in {execution.id}"
        )
    moved = replace(execution, seq=execution.seq + 1, status=status)
    if isinstance(event, _STEP_EVENTS):
        return _with_step(moved, event)
    return _with_execution(moved, event)


def _with_execution(execution: Execution, event: Event) -> Execution:  # noqa: PLR0911 - one return per event
    match event:
        case ExecutionStarted(at_ms=at_ms):
            return replace(execution, started_at_ms=at_ms)
        case ExecutionParked(wake_at_ms=wake_at_ms):
            return replace(execution, wake_at_ms=wake_at_ms)
        case ExecutionResumed():
            return replace(execution, wake_at_ms=None)
        case CancelRequested(reason=reason):
            return replace(execution, cancel_reason=reason, wake_at_ms=None)
        case ExecutionCompleted(at_ms=at_ms, data=data):
            return replace(execution, completed_at_ms=at_ms, data=data)
        case ExecutionFailed(at_ms=at_ms, error=error, error_code=code):
            return replace(
                execution, completed_at_ms=at_ms, wake_at_ms=None, error=error, error_code=code
            )
        case ExecutionCancelled(at_ms=at_ms, error=error):
            return replace(execution, completed_at_ms=at_ms, error=error, error_code="CANCELLED")
        case _:
            raise IllegalTransitionError(f"{type(event).__name__} is no event of an execution")


def _with_step(execution: Execution, event: Event) -> Execution:
    match event:
        case StepStarted(at_ms=at_ms, step_id=step_id, attempt=attempt):
            return _started(execution, step_id, attempt, at_ms)
        case StepSkipped(at_ms=at_ms, step_id=step_id):
            if step_id in execution.steps:
                raise IllegalTransitionError(f"step {step_id} has started, it cannot be skipped")
            skipped = StepState(StepStatus.SKIPPED, 0, 0, at_ms, at_ms)
            return _put(execution, step_id, skipped)
        case ChunkEmitted(step_id=step_id):
            _running(execution, step_id)
            return execution
        case StepCompleted(at_ms=at_ms, step_id=step_id, output=output, usage=usage):
            step = _running(execution, step_id)
            return _put(
                execution,
                step_id,
                replace(
                    step,
                    status=StepStatus.COMPLETED,
                    completed_at_ms=at_ms,
                    output=output,
                    error=None,
                    usage=step.usage + usage,
                ),
            )
        case StepRetrying():
            return _retrying(execution, event)
        case StepFailed(at_ms=at_ms, step_id=step_id, error=error, error_code=code, usage=usage):
            step = _running(execution, step_id)
            status = StepStatus.CANCELLED if code == "CANCELLED" else StepStatus.FAILED
            failed = replace(
                step,
                status=status,
                completed_at_ms=at_ms,
                error=error,
                usage=step.usage + usage,
                wasted_tokens=step.wasted_tokens + usage.total_tokens,
            )
            return _put(execution, step_id, failed)
        case _:
            raise IllegalTransitionError(f"{type(event).__name__} is no event of a step")


def _started(execution: Execution, step_id: str, attempt: int, at_ms: int) -> Execution:
    before = execution.steps.get(step_id)
    if before is None:
        return _put(execution, step_id, StepState(StepStatus.RUNNING, attempt, 1, at_ms))
    if before.status is not StepStatus.RETRYING:
        raise IllegalTransitionError(f"step {step_id} is {before.status}, it cannot start")
    again = replace(before, status=StepStatus.RUNNING, attempt=attempt, wake_at_ms=None)
    return _put(execution, step_id, again)


def _retrying(execution: Execution, event: StepRetrying) -> Execution:
    step = _running(execution, event.step_id)
    is_execution_retry = event.execution_attempt > execution.attempt
    is_new_attempt = event.attempt > step.attempt
    tries = 1 if is_execution_retry else step.tries + is_new_attempt
    waiting = replace(
        step,
        status=StepStatus.RETRYING,
        tries=tries,
        error=event.error,
        usage=step.usage + event.usage,
        wasted_tokens=step.wasted_tokens + event.usage.total_tokens,
        attempt=event.attempt,
        wake_at_ms=event.wake_at_ms,
        losses=step.losses + (not is_new_attempt),
    )
    return _put(replace(execution, attempt=event.execution_attempt), event.step_id, waiting)


def _running(execution: Execution, step_id: str) -> StepState:
    step = execution.steps.get(step_id)
    if step is None or step.status is not StepStatus.RUNNING:
        status = "not started" if step is None else step.status
        raise IllegalTransitionError(f"step {step_id} of {execution.id} is {status}, not running")
    return step


def _put(execution: Execution, step_id: str, step: StepState) -> Execution:
    return replace(execution, steps={**execution.steps, step_id: step})

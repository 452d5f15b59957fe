"""The outside world on one page: what the services need, and who must provide it.

Longer than 400 lines because a reader wants all of it in one place.

Owns the protocols only. Their implementations stand in `adapters/`, one file per technology and
port; tests have their own. Invariant: a port speaks core's values, never a library's.
"""

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Protocol, TypeAlias

from serve_app.core.app_events import AppEvent
from serve_app.core.auth import KeyRecord, Principal
from serve_app.core.delivery import (
    Attempt,
    ClaimedDelivery,
    Delivery,
    DeliveryStatus,
    EndpointHealth,
    Verdict,
)
from serve_app.core.emitted import NOTHING, Emitted
from serve_app.core.errors import Problem
from serve_app.core.execution import Execution, ExecutionCreated, Wait
from serve_app.core.gates import Gate, Rate
from serve_app.core.inference import (
    AdmitRequest,
    Chunk,
    GenerationRequest,
    Grant,
    JsonValue,
    ReplicaLoad,
    Resumed,
    Usage,
)
from serve_app.core.journal import (
    Commit,
    CommitAnswer,
    Heartbeat,
    Notice,
    Outgoing,
    Owned,
    StoredEvent,
)
from serve_app.core.limits import Limits, Standing
from serve_app.core.routing import Decision, ReplicaReport
from serve_app.core.session import Session, SessionLimits, SessionMessage
from serve_app.core.tools import Turn
from serve_app.core.usage import Spending, UsageRow
from serve_app.core.webhooks import Webhook
from serve_app.core.workflow import Workflow


class Clock(Protocol):
    """Time comes in by this door alone."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        ...

    def monotonic_s(self) -> float:
        """Seconds of a clock that never goes back."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Wait."""
        ...


class Entropy(Protocol):
    """Chance comes in by this door alone."""

    def uniform(self) -> float:
        """A number in [0, 1)."""
        ...

    def token(self) -> str:
        """22 URL-safe characters that nobody can guess (128 bits)."""
        ...


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request to somebody else's server.

    Args:
        timeout_s: for all of it, from the name look-up to the last byte read.
        answer_bytes_max: of the answer's body; the rest is not read.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes
    timeout_s: float
    answer_bytes_max: int


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer of whatever status; header names in lower case, the first of a name counts."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    is_cut: bool


class HttpClient(Protocol):
    """Requests that leave the cluster, all of them under `core.egress`."""

    async def request(self, request: HttpRequest) -> HttpAnswer:
        """Send once: no redirect is followed, no proxy of the environment used, nothing retried.

        Raises:
            EgressRefusedError: the URL, or every address its host has now, is refused.
            DeadlineExceededError: the answer was not complete in time.
            ExchangeFailedError: no connection, bad TLS, or a broken answer.
        """
        ...


class InferenceEngine(Protocol):
    """One model engine inside a replica. All methods run on the replica's event loop."""

    def submit(self, request: GenerationRequest, emit: Callable[[Chunk | Exception], None]) -> None:
        """Start a generation and return at once.

        `emit` is called on the loop, once per engine step that had something for this request;
        the last call carries a chunk with `finish_reason`, or a `ServeAppError`.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Stop a generation; `emit` gets one last chunk, `cancelled`, with the usage so far."""
        ...

    def load(self) -> ReplicaLoad:
        """The present load."""
        ...

    async def check_health(self) -> None:
        """Raise when the engine is dead or does not advance."""
        ...

    async def stop(self) -> None:
        """Stop the engine and its processes."""
        ...


class Admission(Protocol):
    """The router, as its callers see it."""

    async def admit(self, request: AdmitRequest) -> Grant:
        """Choose a replica.

        Raises:
            ModelNotAvailableError: no replica serves this model.
            NoHostsAvailableError: none of those that serve it can take the request now.
        """
        ...

    async def decisions(self, limit: int) -> Sequence[Decision]:
        """The router's latest decisions, newest first; of one router where there are several."""
        ...


class TokenLink(Protocol):
    """Requests go out and token chunks come back, straight between caller and replica."""

    def generate(self, grant: Grant, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the answer; closing the iterator aborts the generation at the replica.

        Deltas that arrived while the consumer was busy come merged as one chunk.

        Raises:
            ConnectionFailedError: the link broke before the last chunk.
            ServeAppError: what the engine answered.
        """
        ...


# `services.inference.Inference.generate`, to those who need no more of it.
Admit: TypeAlias = Callable[[AdmitRequest], Awaitable[Grant]]
Generate: TypeAlias = Callable[[GenerationRequest], AsyncGenerator[Chunk, None]]


@dataclass(frozen=True, slots=True)
class OpenAiModel:
    """A model as OpenAI's API shows it.

    Args:
        path: a directory or hub name; its configuration and tokenizer are read from there.
        names: the ids it answers to, its own first.
        context_max: tokens of prompt and answer; 0: what the model allows.
        tool_parser, reasoning_parser: how its tool calls and its reasoning are written, under
            vLLM's names; empty: it has none.
        created_s: since when it is served, Unix epoch.
        runner: what it is for, under vLLM's names.
    """

    path: str
    names: tuple[str, ...]
    context_max: int = 0
    tool_parser: str = ""
    reasoning_parser: str = ""
    created_s: int = 0
    runner: str = "auto"


@dataclass(frozen=True, slots=True)
class OpenAiCall:
    """What an HTTP call brings beside its body, and wants to hear.

    Args:
        request_id: the answer's id is made of it; two calls may have the same.
        deadline_ms: Unix epoch; past it the engine aborts.
        on_begin: called once, when the engine has begun to answer.
        report_usage: called once, however the call ends, with what the engine counted and
            whether the answer was given whole.
        tenant, session: as in `GenerationRequest`; a session that the body names comes first.
    """

    request_id: str
    deadline_ms: int | None
    on_begin: Callable[[], None]
    report_usage: Callable[[Usage, bool], None]
    tenant: str = ""
    session: str = ""


@dataclass(frozen=True, slots=True)
class OpenAiAnswer:
    """A JSON body, or the bytes of server-sent events; closing those aborts the generation."""

    status: int
    body: bytes | AsyncGenerator[bytes, None]


class OpenAiServing(Protocol):
    """Serving code of OpenAI's API over our replicas."""

    @property
    def models(self) -> tuple[OpenAiModel, ...]:
        """What it serves."""
        ...

    async def run(self) -> None:
        """Get ready, then rest until cancelled."""
        ...

    async def answer(self, kind: str, body: object, call: OpenAiCall) -> OpenAiAnswer:
        """Answer one call; cancelling it aborts what it began.

        Args:
            kind: the path under `/v1/`: `chat/completions`, `completions`, `responses` or
                `embeddings`.
            body: the parsed JSON.
            call: see there.

        Raises:
            ModelNotAvailableError: no such model; the message names those there are.
            OverloadedError: it is still starting.
            ServeAppError: what the router or the engine answered before the first token.
        """
        ...


class Expressions(Protocol):
    """The expression language of definitions (CEL)."""

    def check(self, text: str) -> str | None:
        """Why the text is no expression, or None."""
        ...

    def evaluate(self, text: str, scope: Mapping[str, object]) -> object:
        """The value, as JSON-like Python values.

        Raises:
            StepFailedError: not retryable: a missing key, a wrong type, too costly.
        """
        ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """`is_new` is false when the id was there before; `execution` is then the present state."""

    is_new: bool
    execution: Execution


class Schemas(Protocol):
    """JSON Schema, draft 2020-12."""

    def check(self, schema: object) -> str | None:
        """Why it is no schema that can be used, or None."""
        ...

    def problems(self, schema: object, value: object) -> tuple[Problem, ...]:
        """All that is wrong with a value, bounded, by place."""
        ...


@dataclass(frozen=True, slots=True)
class StepCall:
    """One attempt of a step, as its type sees it.

    Args:
        settings: the step's settings with every expression evaluated.
        input: the execution's input.
        idempotency_key: the same for every run of this attempt, whichever worker runs it.
        deadline_ms: the execution's, Unix epoch.
        emit: takes a text delta and the token ids behind it; never blocks.
        report_usage: takes the attempt's usage so far; counted however the attempt ends.
        workspace: whose work it is.
        publish: says how far the execution is (0 to 100), and what is being done.
        created: what the execution was accepted with.
        hand_over: the step waits from here on, once `run` has returned; the message leaves with
            the commit in which it begins to.
        send: takes an event that leaves with the commit of the step's result, its time filled in;
            only for `compute`, whose result and commit are one.
        turn: of a model that has tools: which it may call now, and how the rounds before went.
        emitted: by a run of this attempt whose worker was lost; this one goes on behind it.
        report_resumed: says how an answer went on after a loss.
    """

    execution_id: str
    step_id: str
    attempt: int
    settings: JsonValue
    input: JsonValue
    idempotency_key: str
    deadline_ms: int | None
    priority: int
    emit: Callable[[str, tuple[int, ...]], None]
    report_usage: Callable[[Usage], None]
    workspace: str = ""
    created: ExecutionCreated | None = None
    hand_over: Callable[[Wait, Outgoing], None] = lambda _wait, _outgoing: None
    publish: Callable[[float, str], None] = lambda _progress, _message: None
    send: Callable[[AppEvent], None] = lambda _event: None
    turn: Turn | None = None
    emitted: Emitted = NOTHING
    report_resumed: Callable[[Resumed], None] = lambda _resumed: None


@dataclass(frozen=True, slots=True)
class StepType:
    """A kind of step: how its settings are checked, and how it runs.

    Exactly one of the three is set. `compute` is pure and quick: it runs inside the decision and
    shares its commit. `run` has effects: its start is durable before it is called. `wait` says
    what the step waits for, given the present time (Unix ms); it is as pure as `compute`.

    `can_resume`: whether a `run` with these settings heeds `StepCall.emitted`. Such a step emits
    the last tokens of its answer in the same breath as it returns, so that the journal never has
    a whole answer without its result.
    """

    check: Callable[[JsonValue], Sequence[Problem]]
    compute: Callable[[StepCall], JsonValue] | None = None
    run: Callable[[StepCall], Awaitable[JsonValue]] | None = None
    wait: Callable[[StepCall, int], Wait] | None = None
    can_resume: Callable[[JsonValue], bool] = lambda _settings: False


@dataclass(frozen=True, slots=True)
class ListQuery:
    """Which executions to list.

    Args:
        before: (created Unix ms, id) of the last one seen; None: from the newest.
        limit: 1 or more.
    """

    workspace: str
    workflow_id: str | None = None
    status: str | None = None
    before: tuple[int, str] | None = None
    limit: int = 50


class ExecutionStore(Protocol):
    """Journals and snapshots, durable when a call returns.

    Every call may be repeated after a lost answer without harm. All raise StoreUnavailableError
    when the store stays out of reach.
    """

    @property
    def partition_count(self) -> int:
        """Fixed per cluster."""
        ...

    async def create(
        self,
        execution_id: str,
        created: ExecutionCreated,
        commit_id: str,
        watcher: str,
        start_at_ms: int = 0,
    ) -> Accepted:
        """Accept an execution, hand it to a worker, and tell `watcher` ("": nobody) of its events.

        It is handed on once `start_at_ms` (Unix epoch) has come and its gates let it through.

        Raises:
            OverloadedError: the partition's ready queue is full.
        """
        ...

    async def commit(self, commit: Commit) -> CommitAnswer:
        """Append one transition atomically."""
        ...

    async def load(self, execution_id: str) -> Execution | None:
        """The present state."""
        ...

    async def read(self, execution_id: str, after: int, limit: int) -> Sequence[StoredEvent]:
        """Events with a sequence number above `after`, in order, at most `limit`."""
        ...

    async def watch(self, execution_id: str, watcher: str) -> Execution | None:
        """Be told of all events after the state returned."""
        ...

    async def recent(self, wanted: ListQuery) -> Sequence[Execution]:
        """Executions that match, newest first."""
        ...

    async def live_workers(self) -> int:
        """Workers whose lease has not run out."""
        ...

    async def last_seqs(self, execution_ids: Collection[str]) -> Mapping[str, int]:
        """The last sequence numbers; ids that are gone are left out."""
        ...


@dataclass(frozen=True, slots=True)
class GatePlaces:
    """How full a gate is; `has_result` says that it keeps one to share."""

    inside_count: int
    waiting_count: int
    has_result: bool


class FlowStore(Protocol):
    """Gates and rates. Raises StoreUnavailableError when the store stays out of reach."""

    async def places(self, gate: Gate) -> GatePlaces:
        """How full a gate is now."""
        ...

    async def take_rate(self, rate: Rate, count: int, ahead_max_ms: int) -> int:
        """Take so many from a rate, now or later; a negative count is given back.

        Returns:
            The ms to wait before the start, at most `ahead_max_ms`; where that is not enough,
            nothing is taken and the answer is minus the ms until it would be.
        """
        ...


class WorkerStore(ExecutionStore, Protocol):
    """What an executor needs beyond a reader."""

    async def heartbeat(
        self, partition: int, worker_id: str, lease_ttl_ms: int, capacity: int
    ) -> Heartbeat:
        """Renew the lease; fire due timers; reassign what dead workers owned."""
        ...

    async def claim(self, partition: int, worker_id: str, limit: int) -> Sequence[Owned]:
        """Own up to `limit` executions of the ready queue."""
        ...

    async def owned(self, partition: int, worker_id: str) -> Sequence[Owned]:
        """All that the worker owns here."""
        ...

    async def reap(self, partition: int, worker_id: str) -> int:
        """Take everything from a worker and hand it on; how many. A living one loses its fence."""
        ...

    async def relay(self, partition: int, limit: int) -> int:
        """Deliver up to `limit` outgoing messages of a partition; how many."""
        ...

    async def send(self, outgoing: Outgoing) -> bool:
        """Apply one message at its target; whether it was new there."""
        ...


class Bells(Protocol):
    """Hints that something was appended. They may be lost: read after each Resubscribed."""

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Notice]]:
        """Notices from the moment the context is entered."""
        ...


@dataclass(frozen=True, slots=True)
class Defined:
    """A stored definition; `is_new` is false where the same one was there already."""

    workflow: Workflow
    version: int
    is_new: bool


class WorkflowCatalog(Protocol):
    """Definitions, by immutable version."""

    async def define(self, workspace: str, document: object) -> Defined:
        """Check and store a definition.

        Raises:
            InvalidWorkflowError: with every problem and its place.
        """
        ...

    def check(self, document: object) -> Workflow:
        """Check a definition without storing it. Raises as `define`."""
        ...

    async def undefine(self, workspace: str, workflow_id: str) -> bool:
        """Take a definition away; running executions keep theirs. Whether it was there."""
        ...

    async def ids(self, workspace: str) -> tuple[str, ...]:
        """Ids of the workspace's own definitions and of those we ship, sorted."""
        ...

    async def versions(self, workspace: str, workflow_id: str) -> Mapping[int, int]:
        """When each version was stored (Unix ms), oldest first.

        Raises:
            UnknownWorkflowError: there is none of this id.
        """
        ...

    async def latest(self, workspace: str, workflow_id: str) -> tuple[int, Workflow]:
        """The version that a new execution runs.

        Raises:
            UnknownWorkflowError: there is none of this id.
        """
        ...

    async def version(self, workspace: str, workflow_id: str, version: int) -> Workflow:
        """The version an execution was accepted with."""
        ...

    async def triggered(self, workspace: str) -> Sequence[tuple[int, Workflow]]:
        """The latest versions that have triggers, shipped ones included."""
        ...


class ReplicaRegistry(Protocol):
    """What the model replicas say of themselves."""

    async def announce(self, report: ReplicaReport) -> None:
        """Publish a report and keep it as the replica's last."""
        ...

    async def withdraw(self, replica_id: str) -> None:
        """Forget a replica that stops."""
        ...

    async def latest(self) -> tuple[ReplicaReport, ...]:
        """The last report of each replica, oldest first."""
        ...

    def reports(self) -> AbstractAsyncContextManager[AsyncIterator[ReplicaReport]]:
        """Present reports first, then each new one."""
        ...


class ClaimState(StrEnum):
    """What a request with an Idempotency-Key finds."""

    YOURS = "yours"
    BUSY = "busy"
    CONFLICT = "conflict"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Claim:
    """`answer` is the first one, where the state is `DONE`."""

    state: ClaimState
    answer: bytes | None = None


class Idempotency(Protocol):
    """First answers by (workspace, route, key), kept for 24 h. Every call may be repeated."""

    async def begin(self, scope: tuple[str, ...], body_hash: str, claim_id: str) -> Claim:
        """Claim the work, or learn who has it or how it ended; a dead claimer's runs out."""
        ...

    async def finish(self, scope: tuple[str, ...], claim_id: str, answer: bytes) -> None:
        """Keep the answer for repeats."""
        ...

    async def drop(self, scope: tuple[str, ...], claim_id: str) -> None:
        """Give the claim up: the work was refused, and a repeat may do it."""
        ...


class LimitStore(Protocol):
    """Windows of limited keys, counted in one place for all processes."""

    async def take(
        self, workspace: str, key_id: str, limits: Limits, spent_tokens: int
    ) -> Standing:
        """Count one request against a key's limits; a refused one is not counted.

        `spent_tokens` is what the key has ever spent.
        """
        ...


class UsageLedger(Protocol):
    """Tokens by workspace, day, workflow and key. The commit that ends an execution counts it."""

    async def add(self, spending: Spending) -> None:
        """Count a call that was no execution; a second entry of the same id counts nothing."""
        ...

    async def rows(self, workspace: str, first: date, last: date) -> Sequence[UsageRow]:
        """Counts of the days from `first` to `last`, both included; several for the same names."""
        ...

    async def spent_tokens(self, workspace: str, key_id: str) -> int:
        """What a key has ever spent; it only grows, but for a key idle for a month."""
        ...


class RequestMetrics(Protocol):
    """What the ingress counts of its requests."""

    def request_answered(
        self, method: str, route: str, status: int, first_byte_s: float | None
    ) -> None:
        """Count a request; `route` is its template, and no status or time means no answer."""
        ...

    def stream_opened(self) -> None:
        """An event stream began."""
        ...

    def stream_closed(self) -> None:
        """An event stream ended, however."""
        ...


class MetricsPage(Protocol):
    """The metrics of all processes."""

    async def run(self) -> None:
        """Publish this process's own until cancelled."""
        ...

    async def page(self) -> bytes:
        """In Prometheus's text format; without the other processes' while the store is away."""
        ...


class TurnLine(StrEnum):
    """Where a turn stands in its session's line."""

    RUNNING = "running"
    WAITING = "waiting"
    FULL = "full"
    LOST = "lost"
    ENDED = "ended"


class SessionStore(Protocol):
    """Conversations, durable when a call returns. Every call may be repeated without harm."""

    @property
    def partition_count(self) -> int:
        """Fixed per cluster."""
        ...

    async def create(self, session: Session, idle_ms: int) -> None:
        """Keep a new session."""
        ...

    async def find(self, session_id: str) -> Session | None:
        """The session; None when it was never there or has ended."""
        ...

    async def end(self, session_id: str) -> bool:
        """Forget a session and all it holds; whether it was there."""
        ...

    async def messages(self, session_id: str, start: int, limit: int) -> Sequence[SessionMessage]:
        """Messages from index `start` on, oldest first."""
        ...

    async def join(self, session_id: str, turn_id: str, limits: SessionLimits) -> TurnLine:
        """Stand in line for a turn, behind those that wait already."""
        ...

    async def hold(self, session_id: str, turn_id: str, limits: SessionLimits) -> TurnLine:
        """Keep the place for another lease, in line or running; LOST: the lease had run out."""
        ...

    async def leave(self, session_id: str, turn_id: str) -> None:
        """Give the place up."""
        ...

    async def keep(
        self,
        session_id: str,
        turn_id: str,
        turn: tuple[SessionMessage, SessionMessage],
        idle_ms: int,
    ) -> TurnLine:
        """Append what a running turn has brought, and give the place up.

        RUNNING: it is kept. LOST: the lease had run out. ENDED: the session has gone.
        """
        ...


class KeyRing(Protocol):
    """API keys, known by their hash alone, and the workspaces they belong to."""

    async def find(self, key: str) -> Principal | None:
        """Who a key belongs to; None when it is not known or has expired."""
        ...

    async def put(self, key: str, record: KeyRecord) -> None:
        """Make a key known, or change its record."""
        ...

    async def records(self, workspace: str) -> Sequence[KeyRecord]:
        """The keys of a workspace, oldest first."""
        ...

    async def revoke(self, workspace: str, key_id: str) -> bool:
        """Forget a key, everywhere within a second; whether it was there."""
        ...

    async def add_workspace(self, workspace: str, name: str) -> bool:
        """Make a workspace; False when it is there already."""
        ...

    async def workspaces(self) -> Mapping[str, tuple[str, int]]:
        """Name and creation time (Unix ms) by id."""
        ...


class Vault(Protocol):
    """Seals what must not stand in the store in the clear."""

    def seal(self, data: bytes, context: str) -> str:
        """Encrypted for this context: it opens for no other."""
        ...

    def open(self, sealed: str, context: str) -> bytes:
        """What was sealed.

        Raises:
            SealBrokenError: of another context or cluster secret, or changed.
        """
        ...


class WebhookStore(Protocol):
    """Endpoints by workspace."""

    async def put(self, webhook: Webhook, count_max: int) -> bool:
        """Store a webhook whose `revision` is that of its last reading, 0 for a new one.

        False: it was changed or deleted meanwhile.

        Raises:
            TooManyWebhooksError: it is new, and the workspace has `count_max` already.
        """
        ...

    async def all(self, workspace: str) -> Sequence[Webhook]:
        """The present ones, oldest first."""
        ...

    async def known(self, workspace: str, not_before_ms: int = 0) -> Sequence[Webhook]:
        """As `all`, perhaps a second old, but never as of a moment before `not_before_ms`."""
        ...

    async def remove(self, workspace: str, webhook_id: str) -> bool:
        """Delete one; whether it was there."""
        ...


@dataclass(frozen=True, slots=True)
class ClaimLimits:
    """What a claim goes by.

    Args:
        lease_ttl_ms: without a claim for so long, what a dispatcher holds goes to others.
        window_max: deliveries under way to one endpoint at once, when it answers well.
        backlog_max: deliveries that may wait for one endpoint; beyond it they are dead at once.
        retention_ms: how long an ended delivery is kept.
    """

    lease_ttl_ms: int
    window_max: int
    backlog_max: int
    retention_ms: int


@dataclass(frozen=True, slots=True)
class ClaimedBatch:
    """Deliveries to send now; `next_in_ms` until there may be more, None: until it is told."""

    deliveries: tuple[ClaimedDelivery, ...]
    next_in_ms: int | None


@dataclass(frozen=True, slots=True)
class Recorded:
    """The endpoint afterwards; `next_in_ms` as in `ClaimedBatch`."""

    health: EndpointHealth
    now_ms: int
    next_in_ms: int | None


@dataclass(frozen=True, slots=True)
class DeliveryQuery:
    """Which deliveries of an endpoint to list, newest first.

    Args:
        before: (created Unix ms, id) of the last one seen; None: from `to_ms`, or the newest.
    """

    webhook_id: str
    status: DeliveryStatus | None = None
    from_ms: int | None = None
    to_ms: int | None = None
    before: tuple[int, str] | None = None
    limit: int = 50


class DeliveryQueue(Protocol):
    """Deliveries, durable when a call returns; each endpoint has a queue of its own."""

    @property
    def partition_count(self) -> int:
        """Fixed per cluster."""
        ...

    async def claim(
        self, partition: int, dispatcher_id: str, limit: int, limits: ClaimLimits
    ) -> ClaimedBatch:
        """Lease up to `limit` due deliveries, fairly over endpoints, and renew the own lease."""
        ...

    async def record(
        self, dispatcher_id: str, claimed: ClaimedDelivery, verdict: Verdict, attempt: Attempt
    ) -> Recorded | None:
        """Note a try and what follows from it; None: the lease was lost, nothing was noted."""
        ...

    async def drop(self, dispatcher_id: str, claimed: ClaimedDelivery, attempt: Attempt) -> None:
        """Note that it will not be sent, whatever the endpoint's health: it is dead."""
        ...

    async def pause(self, webhook_id: str, for_ms: int) -> None:
        """Send nothing to an endpoint for a while."""
        ...

    async def release(self, partition: int, dispatcher_id: str) -> int:
        """Give back what a dispatcher holds; how many."""
        ...

    async def accept(self, outgoing: Outgoing) -> bool:
        """Put one in, as the relay does; whether it was new."""
        ...

    async def replay(self, workspace: str, delivery_id: str) -> bool | None:
        """Send again as if new; False: it is being sent now; None: there is none."""
        ...

    async def delivery(self, delivery_id: str) -> Delivery | None:
        """One delivery."""
        ...

    async def deliveries(
        self, wanted: DeliveryQuery
    ) -> tuple[Sequence[Delivery], tuple[int, str] | None]:
        """A page, and where the next one begins; None: there is none."""
        ...

    async def forget(self, webhook_id: str) -> None:
        """Delete all deliveries of an endpoint."""
        ...

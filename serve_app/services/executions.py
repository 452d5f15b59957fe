"""What every surface calls: start, look, cancel, follow.

Owns the checks before acceptance and the workspace border. Invariant: nothing is queued before its
input has been checked, and another workspace's id is as unknown as one that never was.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from serve_app.core.decisions import cancel, kept_for_retry, receive
from serve_app.core.errors import (
    IdempotencyConflictError,
    InvalidInputError,
    NotTerminalError,
    Problem,
    UnknownExecutionError,
)
from serve_app.core.execution import Event, Execution, ExecutionCreated, evolve, new_execution
from serve_app.core.inference import JsonValue
from serve_app.core.journal import (
    Commit,
    Committed,
    Conflict,
    StoredEvent,
    derived_execution_id,
    execution_id,
)
from serve_app.core.retry import RetryPolicy
from serve_app.core.workflow import NO_FLOW_CONTROL, FlowControl, Workflow
from serve_app.ports import (
    Clock,
    Entropy,
    ExecutionStore,
    ListQuery,
    Schemas,
    WorkflowCatalog,
)
from serve_app.services.feeds import Feed, Feeds
from serve_app.services.flow import Flow

_CREATE_COMMIT = "create"
_APPEND_TRIES_MAX = 50  # each lost race means somebody else's commit got in: it cannot go on long


@dataclass(frozen=True, slots=True)
class Submission:
    """A wish to execute.

    Args:
        timeout_ms, retry: override the definition's.
        execution_id: from `Executions.new_id`, so that the caller knows it before it is accepted.
        request_hash: of the body, where there is a key: tells a repeat from a conflict.
        mode: how the caller asks for it: `async`, `sync` or `stream`; webhooks choose by it.
        cache_ttl_ms: overrides the definition's.
    """

    execution_id: str
    workspace: str
    workflow_id: str
    input: JsonValue
    timeout_ms: int | None = None
    retry: RetryPolicy | None = None
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)
    user_id: str | None = None
    priority: int = 0
    key_id: str | None = None
    idempotency_key: str | None = None
    request_hash: str | None = None
    mode: str = "async"
    cache_ttl_ms: int | None = None


@dataclass(frozen=True, slots=True)
class RetryWish:
    """How to retry: `from_step` keeps what does not follow from that step; None: from the start."""

    from_step: str | None = None
    idempotency_key: str | None = None
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """An accepted execution; `is_new` is false for a repeat under the same key."""

    execution: Execution
    is_new: bool


class Executions:
    """The use cases over one store and one hub."""

    def __init__(  # noqa: PLR0913 - one argument per port
        self,
        store: ExecutionStore,
        catalog: WorkflowCatalog,
        schemas: Schemas,
        feeds: Feeds,
        clock: Clock,
        entropy: Entropy,
        *,
        flow: Flow,
        timeout_default_ms: int,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._schemas = schemas
        self._feeds = feeds
        self._clock = clock
        self._entropy = entropy
        self._flow = flow
        self._timeout_default_ms = timeout_default_ms

    def new_id(self, workspace: str, scope: str, idempotency_key: str | None) -> str:
        """An id for a new execution; the same for the same key in the same scope.

        `scope` is what the key is unique within, beside the workspace: the route.
        """
        count = self._store.partition_count
        if idempotency_key is None:
            return execution_id(int(self._entropy.uniform() * count), self._entropy.token())
        return derived_execution_id(count, workspace, scope, idempotency_key)

    async def start(self, submission: Submission) -> Started:
        """Accept an execution; durable when this returns.

        Raises:
            UnknownWorkflowError: no such workflow in the workspace.
            InvalidInputError: the input does not satisfy its schema.
            RateLimitExceededError: the workflow's flow control refuses it.
            IdempotencyConflictError: the key came before with another body.
            OverloadedError: the queue is full.
        """
        return await self._create(*await self._prepare(submission))

    @asynccontextmanager
    async def start_and_follow(self, submission: Submission) -> AsyncIterator[tuple[Started, Feed]]:
        """Accept an execution and follow it from its first event. Raises as `start`."""
        new, start_at_ms = await self._prepare(submission)
        first = StoredEvent(1, _CREATE_COMMIT, new.created)
        async with self._feeds.begin(new, first) as feed:
            started = await self._create(new, start_at_ms, self._feeds.watcher_id)
            if started.is_new:
                feed.settle(new.created)
                yield started, feed
                return
        # A repeat: what was begun above is not its history, so follow what the store has.
        async with self.follow(submission.workspace, new.id) as present:
            yield started, present

    async def load(self, workspace: str, an_execution_id: str) -> Execution:
        """The present state.

        Raises:
            UnknownExecutionError: there is none of this id in the workspace.
        """
        return _visible(await self._store.load(an_execution_id), workspace, an_execution_id)

    @asynccontextmanager
    async def follow(self, workspace: str, an_execution_id: str) -> AsyncIterator[Feed]:
        """Follow an execution. Raises as `load`."""
        async with self._feeds.follow(an_execution_id) as feed:
            _visible(None if feed is None else feed.execution, workspace, an_execution_id)
            assert feed is not None, "an execution that is visible has a feed"
            yield feed

    async def cancel(self, workspace: str, an_execution_id: str, reason: str) -> Execution:
        """Ask for an end; repeating it is harmless.

        Raises:
            UnknownExecutionError: there is none of this id in the workspace.
            AlreadyTerminalError: it has ended.
        """
        return await self._append(
            workspace, an_execution_id, lambda execution: cancel(execution, reason, self._now_ms())
        )

    async def signal(
        self, workspace: str, an_execution_id: str, name: str, data: JsonValue
    ) -> Execution:
        """Send a signal; a step that waits for it, now or later, takes it.

        Raises:
            UnknownExecutionError: there is none of this id in the workspace.
            AlreadyTerminalError: it has ended.
            TooManySignalsError: it holds as many as are kept.
        """
        return await self._append(
            workspace,
            an_execution_id,
            lambda execution: receive(execution, name, data, self._now_ms()),
        )

    async def _append(
        self,
        workspace: str,
        an_execution_id: str,
        decide: Callable[[Execution], tuple[Event, ...]],
    ) -> Execution:
        """Append what anybody may; decided again after each lost race."""
        execution = await self.load(workspace, an_execution_id)
        commit_id = f"append.{self._entropy.token()}"
        for _ in range(_APPEND_TRIES_MAX):
            events = decide(execution)
            if not events:
                return execution
            after = evolve(execution, events[0])
            answer = await self._store.commit(Commit(commit_id, None, execution, after, events))
            match answer:
                case Committed():
                    return after
                case Conflict(missed=missed, is_ours=is_ours):
                    for stored in missed:
                        execution = evolve(execution, stored.event)
                    if is_ours:
                        return execution
                case _:
                    break
        return await self.load(workspace, an_execution_id)

    def _now_ms(self) -> int:
        return self._clock.now_ms()

    async def recent(self, wanted: ListQuery) -> Sequence[Execution]:
        """Executions of a workspace, newest first."""
        return await self._store.recent(wanted)

    async def retry(self, workspace: str, an_execution_id: str, wish: RetryWish) -> Started:
        """Run an ended execution's input again as a new execution of the same version.

        Raises:
            UnknownExecutionError: there is none of this id in the workspace.
            NotTerminalError: it has not ended.
            RateLimitExceededError: the workflow's flow control refuses it.
            InvalidRequestError: `wish.from_step` is no step of it.
            InvalidInputError: an event brought an input that it does not take.
        """
        original = await self.load(workspace, an_execution_id)
        if not original.is_terminal:
            raise NotTerminalError(f"execution {original.id} is {original.status}; cancel it first")
        old = original.created
        workflow = await self._catalog.version(workspace, old.workflow_id, old.workflow_version)
        if old.refusal is not None:
            self._check_input(workflow, old.input)
        created = replace(
            old,
            at_ms=self._clock.now_ms(),
            retry_of=original.id,
            mode="async",
            request_hash=None if wish.idempotency_key is None else (wish.from_step or ""),
            kept=kept_for_retry(original, workflow, wish.from_step),
            key_id=wish.key_id,
            gates=(),
            tokens=None,
            refusal=None,
        )
        new_id = self.new_id(workspace, f"retry/{an_execution_id}", wish.idempotency_key)
        # Whoever retries wants it run again, not the result that another one has.
        flow = replace(workflow.flow, cache_ttl_ms=None)
        is_repeatable = wish.idempotency_key is not None
        admitted = await self._admit(new_id, created, flow, is_repeatable=is_repeatable)
        return await self._create(*admitted)

    async def _admit(
        self,
        new_id: str,
        created: ExecutionCreated,
        flow: FlowControl,
        *,
        is_repeatable: bool,
        may_wait: bool = True,
    ) -> tuple[Execution, int]:
        """The new execution with its gates, and when it may start (Unix epoch, 0: now)."""
        is_repeat = (
            flow != NO_FLOW_CONTROL and is_repeatable and await self._store.load(new_id) is not None
        )
        if flow == NO_FLOW_CONTROL or is_repeat:  # a repeat must not be refused for its first self
            return new_execution(new_id, created), 0
        admitted = await self._flow.admit(created, flow, may_wait=may_wait)
        return new_execution(new_id, admitted.created), admitted.start_at_ms

    async def _prepare(self, submission: Submission) -> tuple[Execution, int]:
        version, workflow = await self._catalog.latest(submission.workspace, submission.workflow_id)
        self._check_input(workflow, submission.input)
        timeout_ms = submission.timeout_ms or workflow.timeout_ms or self._timeout_default_ms
        created = ExecutionCreated(
            at_ms=self._clock.now_ms(),
            workspace=submission.workspace,
            workflow_id=submission.workflow_id,
            workflow_version=version,
            input=submission.input,
            metadata=submission.metadata,
            user_id=submission.user_id,
            timeout_ms=timeout_ms,
            retry=workflow.retry if submission.retry is None else submission.retry,
            priority=submission.priority,
            request_hash=submission.request_hash,
            key_id=submission.key_id,
            mode=submission.mode,
            cancel_on=workflow.cancel_names,
        )
        flow = workflow.flow
        if submission.cache_ttl_ms is not None:
            flow = replace(flow, cache_ttl_ms=submission.cache_ttl_ms)
        return await self._admit(
            submission.execution_id,
            created,
            flow,
            is_repeatable=submission.idempotency_key is not None,
            may_wait=submission.mode == "async",
        )

    def _check_input(self, workflow: Workflow, value: JsonValue) -> None:
        if workflow.input_schema is None:
            return
        problems = self._schemas.problems(workflow.input_schema, value)
        if problems:
            raise InvalidInputError(
                f"input does not satisfy the schema of {workflow.id}",
                [Problem(("input", *problem.loc), problem.msg) for problem in problems],
            )

    async def _create(self, new: Execution, start_at_ms: int, watcher: str = "") -> Started:
        # Nobody is told of what nobody follows yet; `follow` asks to be.
        accepted = await self._store.create(
            new.id, new.created, _CREATE_COMMIT, watcher, start_at_ms
        )
        is_same_body = accepted.execution.created.request_hash == new.created.request_hash
        if not accepted.is_new and not is_same_body:
            raise IdempotencyConflictError(
                "this Idempotency-Key was used with another body; use a new key"
            )
        return Started(accepted.execution, accepted.is_new)


def _visible(execution: Execution | None, workspace: str, an_execution_id: str) -> Execution:
    if execution is None or execution.created.workspace != workspace:
        raise UnknownExecutionError(f"no execution {an_execution_id} in this workspace")
    return execution

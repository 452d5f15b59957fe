"""Starting a workflow by what triggers it: nobody waits for the answer.

Owns what becomes of a start that would be refused: it is accepted, and ends with the refusal as
its error without having run, so that it can be seen, heard of and retried. Invariant: a start is
made again under the same id, and then starts nothing.
"""

from dataclasses import dataclass, replace

from serve_app.core.errors import InvalidInputError, RateLimitExceededError, ServeAppError
from serve_app.core.execution import ExecutionCreated
from serve_app.core.inference import JsonValue
from serve_app.core.origin import Origin, Refusal
from serve_app.core.workflow import NO_FLOW_CONTROL, Workflow
from serve_app.ports import Clock, ExecutionStore, Schemas
from serve_app.services.flow import Admitted, Flow

_CREATE_COMMIT = "create"


@dataclass(frozen=True, slots=True)
class TriggeredStart:
    """A wish to execute that a trigger has.

    Args:
        execution_id: derived from what triggered it.
        hops: how many executions in a row were started by events, up to this one.
    """

    execution_id: str
    workspace: str
    workflow: Workflow
    version: int
    origin: Origin
    input: JsonValue
    key_id: str | None = None
    hops: int = 0


class TriggeredStarts:
    """Starts by events, clocks and hooks."""

    def __init__(
        self,
        store: ExecutionStore,
        schemas: Schemas,
        flow: Flow,
        clock: Clock,
        *,
        timeout_default_ms: int,
    ) -> None:
        self._store = store
        self._schemas = schemas
        self._flow = flow
        self._clock = clock
        self._timeout_default_ms = timeout_default_ms

    async def start(self, wish: TriggeredStart) -> bool:
        """Accept the execution; whether it is new.

        Raises:
            OverloadedError: its partition takes no more now; nothing was accepted.
            StoreUnavailableError: likewise.
        """
        workflow = wish.workflow
        created = ExecutionCreated(
            at_ms=self._clock.now_ms(),
            workspace=wish.workspace,
            workflow_id=workflow.id,
            workflow_version=wish.version,
            input=wish.input,
            timeout_ms=workflow.timeout_ms or self._timeout_default_ms,
            retry=workflow.retry,
            key_id=wish.key_id,
            trigger=wish.origin,
            cancel_on=workflow.cancel_names,
            hops=wish.hops,
        )
        admitted = await self._admit(wish, created)
        accepted = await self._store.create(
            wish.execution_id, admitted.created, _CREATE_COMMIT, "", admitted.start_at_ms
        )
        return accepted.is_new

    async def _admit(self, wish: TriggeredStart, created: ExecutionCreated) -> Admitted:
        flow, schema = wish.workflow.flow, wish.workflow.input_schema
        problems = () if schema is None else self._schemas.problems(schema, wish.input)
        if problems:
            place = ".".join(str(part) for part in ("input", *problems[0].loc))
            return _refused(created, InvalidInputError(f"{place}: {problems[0].msg}"))
        if flow == NO_FLOW_CONTROL or await self._store.load(wish.execution_id) is not None:
            return Admitted(created)  # a repeat takes nothing from a rate
        try:
            return await self._flow.admit(created, flow, may_wait=True)
        except (RateLimitExceededError, InvalidInputError) as error:
            return _refused(created, error)


def _refused(created: ExecutionCreated, error: ServeAppError) -> Admitted:
    return Admitted(replace(created, refusal=Refusal(error.code, str(error))))

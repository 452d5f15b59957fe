"""Starting a workflow from a step: which version, with what input, under which rules.

Owns the checks before a child is started. Starts nothing itself: the child is made by a message
that leaves with the commit in which its parent begins to wait.
"""

from collections.abc import Callable

from serve_app.core.children import DEPTH_MAX, child_id, start, wait_for
from serve_app.core.errors import StepFailedError, UnknownWorkflowError
from serve_app.core.execution import ExecutionCreated
from serve_app.core.inference import JsonValue
from serve_app.core.workflow import DURATION_MS_MAX
from serve_app.ports import Clock, Schemas, StepCall, WorkflowCatalog
from serve_app.services.flow import Flow


class Children:
    """Children of any execution.

    Args:
        catalog: asked for when the first child is started: it needs the step types, one of which
            needs us.
    """

    def __init__(
        self,
        catalog: Callable[[], WorkflowCatalog],
        schemas: Schemas,
        flow: Flow,
        clock: Clock,
        *,
        partition_count: int,
        timeout_default_ms: int,
    ) -> None:
        self._catalog = catalog
        self._schemas = schemas
        self._flow = flow
        self._clock = clock
        self._partition_count = partition_count
        self._timeout_default_ms = timeout_default_ms

    async def start(self, call: StepCall, workflow_id: str, value: JsonValue) -> None:
        """Let the step wait for a child.

        Raises:
            StepFailedError: no such workflow, an input it does not take, or too deep.
            RateLimitExceededError: its flow control refuses it; asked again later.
        """
        parent = call.created
        assert parent is not None, "the planner gives it"
        if parent.depth >= DEPTH_MAX:
            raise StepFailedError(f"workflows start each other at most {DEPTH_MAX} deep", False)  # noqa: FBT003
        try:
            version, workflow = await self._catalog().latest(parent.workspace, workflow_id)
        except UnknownWorkflowError as error:
            raise StepFailedError(str(error), False) from error  # noqa: FBT003
        if workflow.input_schema is not None:
            problems = self._schemas.problems(workflow.input_schema, value)
            if problems:
                place = ".".join(str(part) for part in ("input", *problems[0].loc))
                raise StepFailedError(f"{workflow_id} {place}: {problems[0].msg}", False)  # noqa: FBT003
        now_ms = self._clock.now_ms()
        deadline_ms = parent.deadline_ms or now_ms + DURATION_MS_MAX
        timeout_ms = workflow.timeout_ms or self._timeout_default_ms
        created = ExecutionCreated(
            at_ms=now_ms,
            workspace=parent.workspace,
            workflow_id=workflow_id,
            workflow_version=version,
            input=value,
            metadata=parent.metadata,
            user_id=parent.user_id,
            timeout_ms=max(1, min(timeout_ms, deadline_ms - now_ms)),
            retry=workflow.retry,
            priority=parent.priority,
            key_id=parent.key_id,
            mode=parent.mode,
            parent=call.execution_id,
            depth=parent.depth + 1,
            cancel_on=workflow.cancel_names,
            hops=parent.hops,
        )
        admitted = await self._flow.admit(created, workflow.flow, may_wait=True)
        count = self._partition_count
        new_id = child_id(count, call.execution_id, call.step_id, call.attempt)
        message = start(new_id, admitted.created, admitted.start_at_ms, count)
        call.hand_over(wait_for(new_id, workflow_id, deadline_ms), message)

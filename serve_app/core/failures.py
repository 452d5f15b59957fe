"""What follows a failed attempt: the next one, by the step's tries or the execution's, or its end.

Owns the choice alone, for whatever failed: a run of a step, or a child that it waited for.
"""

from dataclasses import dataclass

from serve_app.core.blocks import is_forgiven
from serve_app.core.errors import ErrorCode
from serve_app.core.execution import Event, Execution, StepFailed, StepRetrying
from serve_app.core.inference import NO_USAGE, Usage
from serve_app.core.retry import retry_delay_ms
from serve_app.core.workflow import Workflow


@dataclass(frozen=True, slots=True)
class StepErrored:
    """A running step ended without an output.

    Args:
        code: CANCELLED when it was cancelled.
        retry_after_ms: another try sooner than that would be in vain.
        is_aborted: we cancelled it, because what it stands in is ending.
    """

    step_id: str
    attempt: int
    error: str
    code: str = ErrorCode.STEP_FAILED
    is_retryable: bool = True
    usage: Usage = NO_USAGE
    is_aborted: bool = False
    retry_after_ms: int | None = None


def after_failure(
    execution: Execution, workflow: Workflow, fact: StepErrored, now_ms: int, jitter: float
) -> Event:
    """The next try of a step in an execution that goes on, or the step's end.

    `jitter` is in [0, 1).
    """
    step = execution.steps[fact.step_id]
    # A step that cancels itself has failed: nobody asked for it, and it must end the execution.
    code = ErrorCode.STEP_FAILED if fact.code == ErrorCode.CANCELLED else fact.code
    failed = StepFailed(now_ms, fact.step_id, fact.error, code, fact.usage)
    if not fact.is_retryable:
        return failed
    execution_attempt = execution.attempt
    policy = workflow.step(fact.step_id).retry
    delay_ms = None if policy is None else retry_delay_ms(policy, step.tries, jitter)
    # The execution's own tries are for what would end it.
    if delay_ms is None and not is_forgiven(workflow, fact.step_id):
        delay_ms = retry_delay_ms(execution.created.retry, execution.attempt, jitter)
        execution_attempt += 1
    if delay_ms is None:
        return failed
    return StepRetrying(
        now_ms,
        fact.step_id,
        step.attempt + 1,
        execution_attempt,
        # Never at once: each retry has its own commit.
        now_ms + max(1, delay_ms, fact.retry_after_ms or 0),
        fact.error,
        fact.usage,
    )

"""Executions as clients see them: results, records and stream events of the native API.

Owns the public names and shapes (`api.md`, section 1). Changes no state. Invariant: a public event
carries `executionId` and `timestamp`, and its SSE id is its place in the journal.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

import orjson

from inferpipe.wire import encode_sse
from serve_app.core.decisions import progress_percent
from serve_app.core.execution import (
    KIND_OF,
    ChunkEmitted,
    Event,
    Execution,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionFailed,
    ExecutionStarted,
    StepCompleted,
    StepProgressed,
    StepRetrying,
    StepStarted,
    StepState,
    StepStatus,
)
from serve_app.core.gates import Verdict
from serve_app.core.inference import Usage
from serve_app.core.journal import StoredEvent
from serve_app.core.workflow import Workflow, every_step

UNKNOWN_TYPE = "unknown"  # of a step whose definition was deleted
KEEP_ALIVE = b": keep-alive\n\n"


def timestamp(at_ms: int) -> str:
    """RFC 3339 in UTC, milliseconds."""
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def result_view(execution: Execution) -> dict[str, object]:
    """`ExecutionResult`."""
    created = execution.created
    return {
        "id": execution.id,
        "status": execution.status,
        "data": execution.data,
        "error": execution.error,
        "errorCode": execution.error_code,
        "metadata": created.metadata,
        "usage": usage_view(execution.usage),
        "timing": _timing(execution),
        "attempts": execution.attempt,
        "workflowId": created.workflow_id,
        "workflowVersion": created.workflow_version,
        "cached": execution.verdict is Verdict.HIT,
    }


def record_view(execution: Execution, workflow: Workflow | None) -> dict[str, object]:
    """The full record of `GET /v1/executions/{id}`."""
    steps = [] if workflow is None else list(every_step(workflow.steps))
    types = {step.id: step.type for step in steps}
    order = {step.id: index for index, step in enumerate(steps)}
    return {
        **result_view(execution),
        "progress": progress_percent(execution, workflow),
        "retryOf": execution.created.retry_of,
        "userId": execution.created.user_id,
        "trigger": _trigger_view(execution),
        "createdAt": timestamp(execution.created.at_ms),
        "startedAt": _optional(execution.started_at_ms),
        "completedAt": _optional(execution.completed_at_ms),
        "steps": [
            _step_view(path, types.get(path.rpartition("/")[2], UNKNOWN_TYPE), step)
            for path, step in sorted(
                execution.steps.items(), key=lambda item: _place_of(item[0], order)
            )
        ],
    }


def _trigger_view(execution: Execution) -> dict[str, object]:
    """What started it: `api` is somebody's call."""
    created, origin = execution.created, execution.created.trigger
    if origin is not None:
        at = timestamp(origin.ts)
        return {"type": origin.kind, "id": origin.id, "name": origin.name, "at": at}
    if created.parent is not None:
        return {"type": "parent", "id": created.parent, "name": None, "at": None}
    return {"type": "api", "id": None, "name": None, "at": None}


def _place_of(path: str, order: Mapping[str, int]) -> list[int]:
    """Where a step stands: in document order, and by number inside a map or a loop."""
    return [
        int(part) if part.isdigit() else order.get(part, len(order)) for part in path.split("/")
    ]


def item_view(execution: Execution) -> dict[str, object]:
    """An item of `GET /v1/executions`: the record without `data` and `steps`."""
    record = record_view(execution, None)
    return {name: value for name, value in record.items() if name not in {"data", "steps"}}


def usage_view(usage: Usage) -> dict[str, int]:
    """Token counts under their public names."""
    return {
        "promptTokens": usage.prompt_tokens,
        "completionTokens": usage.completion_tokens,
        "totalTokens": usage.total_tokens,
    }


def render_sse(stored: StoredEvent, execution: Execution) -> bytes | None:
    """One event as SSE bytes; None for what is not shown to clients.

    `execution` is the state after the event.
    """
    shown = _shown(stored.event, execution)
    if shown is None:
        return None
    shown["executionId"] = execution.id
    shown["timestamp"] = timestamp(stored.event.at_ms)
    return encode_sse(KIND_OF[type(stored.event)], orjson.dumps(shown), stored.seq)


def render_gap(requested: int, last_seq: int, execution: Execution, now_ms: int) -> bytes:
    """The event that tells a reader that its cursor is not to be had."""
    data = {
        "requested": requested,
        "last": last_seq,
        "executionId": execution.id,
        "timestamp": timestamp(now_ms),
    }
    return encode_sse("gap", orjson.dumps(data), None)


def _shown(event: Event, execution: Execution) -> dict[str, object] | None:  # noqa: PLR0911 - one return per event
    match event:
        case ChunkEmitted(text=text, step_id=step_id):
            return {"data": text, "step": step_id}
        case StepProgressed(step_id=step_id, progress=progress, message=message):
            return {"step": step_id, "progress": progress, "message": message}
        case ExecutionStarted():
            return {"workflowId": execution.created.workflow_id}
        case StepStarted(step_id=step_id, attempt=attempt):
            return {"step": step_id, "attempt": attempt}
        case StepRetrying(step_id=step_id, attempt=attempt, error=error, wake_at_ms=wake_at_ms):
            retry_at = timestamp(wake_at_ms)
            return {"step": step_id, "attempt": attempt, "error": error, "retryAt": retry_at}
        case StepCompleted(step_id=step_id, output=output, usage=usage):
            return {"step": step_id, "output": output, "usage": usage_view(usage)}
        case ExecutionCompleted() | ExecutionFailed() | ExecutionCancelled():
            return result_view(execution)
        case _:
            return None


def _step_view(step_id: str, kind: str, step: StepState) -> dict[str, object]:
    shown = _state_view(step_id, kind, step)
    if step.resumed is not None:
        shown["resumed"] = step.resumed
    if step.status is StepStatus.WAITING and step.wait is not None:
        until = timestamp(step.wait.until_ms)
        shown["waiting"] = {"until": until, "event": step.wait.event, "message": step.wait.message}
    return shown


def _state_view(step_id: str, kind: str, step: StepState) -> dict[str, object]:
    return {
        "id": step_id,
        "type": kind,
        "status": step.status,
        "attempts": step.attempt,
        "startedAt": timestamp(step.started_at_ms),
        "completedAt": _optional(step.completed_at_ms),
        "output": step.output,
        "error": step.error,
        "usage": usage_view(step.usage),
    }


def _timing(execution: Execution) -> dict[str, int]:
    """Zero until it is known; what ended in the queue spent all its time there.

    Never below zero: acceptance, start and end may be told by the clocks of three hosts.
    """
    created_ms, ended_ms = execution.created.at_ms, execution.completed_at_ms
    started_ms = ended_ms if execution.started_at_ms is None else execution.started_at_ms
    return {
        "queuedMs": _span(created_ms, started_ms),
        "runMs": _span(started_ms, ended_ms),
        "totalMs": _span(created_ms, ended_ms),
    }


def _span(from_ms: int | None, to_ms: int | None) -> int:
    return 0 if from_ms is None or to_ms is None else max(0, to_ms - from_ms)


def _optional(at_ms: int | None) -> str | None:
    return None if at_ms is None else timestamp(at_ms)

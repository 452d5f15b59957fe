"""What the fake server of `inferpipe.testing` and a running service must both do.

Each function takes a client and the ids of four workflows that behave as `Workflows` says; the unit
tests run them on the fake, the end-to-end tests on the service. So the fake cannot drift.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from inferpipe import (
    ConflictError,
    ExecutionFailedError,
    ExecutionStream,
    InferPipe,
    NotFoundError,
    StreamEvent,
)


@dataclass(frozen=True)
class Workflows:
    """`echoing` answers with its input, `texting` streams text, `failing` fails in its step,
    `endless` runs for long and streams something, `waiting` waits for the signal `ask` and
    completes with its data."""

    echoing: str
    texting: str
    failing: str
    endless: str
    waiting: str


CHAT = {"messages": [{"role": "user", "content": "Tell me a story."}], "maxTokens": 12}
ENDLESS = {"messages": [{"role": "user", "content": "Tell me a story."}], "maxTokens": 1500}


def check_execute(client: InferPipe, ids: Workflows) -> None:
    result = client.execute(ids.echoing, {"n": 1}, metadata={"mine": [1]}, user_id="u1")
    assert (result.status, result.data, result.metadata) == ("completed", {"n": 1}, {"mine": [1]})
    assert (result.error, result.error_code, result.cached) == (None, None, False)
    assert (result.workflow_id, result.workflow_version, result.attempts) == (ids.echoing, 1, 1)
    record = client.get_execution(result.id)
    assert (record.user_id, record.progress, record.retry_of) == ("u1", 100, None)
    assert record.created_at <= record.started_at <= record.completed_at  # type: ignore[operator]
    (step,) = record.steps
    assert (step.status, step.attempts, step.output) == ("completed", 1, {"n": 1})


def check_async_and_follow(client: InferPipe, ids: Workflows) -> None:
    info = client.execute_async(ids.echoing, {"n": 2})
    assert (info.status, info.retry_of) == ("pending", None)
    events = list(client.executions.follow(info.id).events())
    last = events[-1].id
    assert [event.id for event in client.executions.follow(info.id, after=last).events()] == [None]
    assert client.executions.follow(info.id, after=last).wait().data == {"n": 2}


def check_stream(client: InferPipe, ids: Workflows) -> None:
    with client.execute_stream(ids.texting, CHAT) as stream:
        assert stream.execution_id is not None
        chunks = [chunk.data for chunk in stream]
    assert stream.result.data == "".join(chunks)
    assert len(chunks) > 1


def check_failure(client: InferPipe, ids: Workflows) -> None:
    with pytest.raises(ExecutionFailedError) as caught:
        client.execute(ids.failing, {})
    result = caught.value.result
    assert (result.status, result.error_code, result.data) == ("failed", "STEP_FAILED", None)
    assert result.error
    assert client.get_execution(result.id).status == "failed"


def check_unknown_ids(client: InferPipe, ids: Workflows) -> None:
    for start in (client.execute, client.execute_async):
        with pytest.raises(NotFoundError) as caught:
            start("no-such-workflow", {})
        assert caught.value.code == "UNKNOWN_WORKFLOW"
    with pytest.raises(NotFoundError), client.execute_stream("no-such-workflow", {}):
        pass
    asks: list[Callable[[str], object]] = [
        client.executions.get,
        client.executions.cancel,
        client.executions.retry,
        lambda one: client.executions.follow(one).wait(),
    ]
    for ask in asks:
        with pytest.raises(NotFoundError) as caught:
            ask("exe_nowhere")
        assert caught.value.code == "UNKNOWN_EXECUTION"


def check_cancel(client: InferPipe, ids: Workflows) -> None:
    with client.execute_stream(ids.endless, ENDLESS) as stream:
        next(iter(stream))
        assert stream.execution_id is not None
        assert client.get_execution(stream.execution_id).status == "running"
        with pytest.raises(ConflictError) as early:
            client.executions.retry(stream.execution_id)
        assert early.value.code == "NOT_TERMINAL"
        client.cancel_execution(stream.execution_id)
        with pytest.raises(ExecutionFailedError) as caught:
            list(client.executions.follow(stream.execution_id))
    assert caught.value.result.status == "cancelled"
    assert caught.value.result.error_code == "CANCELLED"
    with pytest.raises(ConflictError) as late:
        client.cancel_execution(stream.execution_id)
    assert late.value.code == "ALREADY_TERMINAL"


def check_idempotency(client: InferPipe, ids: Workflows) -> None:
    first = client.execute(ids.echoing, {"n": 3}, idempotency_key="contract-1")
    assert client.execute(ids.echoing, {"n": 3}, idempotency_key="contract-1").id == first.id
    with pytest.raises(ConflictError) as caught:
        client.execute(ids.echoing, {"n": 4}, idempotency_key="contract-1")
    assert caught.value.code == "IDEMPOTENCY_CONFLICT"


def check_retry(client: InferPipe, ids: Workflows) -> None:
    first = client.execute(ids.echoing, {"n": 5}, metadata={"k": 1})
    again = client.executions.retry(first.id)
    assert (again.status, again.retry_of) == ("pending", first.id)
    assert again.id != first.id
    result = client.executions.follow(again.id).wait()
    assert (result.data, result.metadata) == ({"n": 5}, {"k": 1})
    assert client.get_execution(again.id).retry_of == first.id


def check_signal(client: InferPipe, ids: Workflows) -> None:
    started = client.execute_async(ids.waiting, {})
    while client.get_execution(started.id).status != "waiting":
        assert client.get_execution(started.id).status in {"pending", "running", "waiting"}
    (step,) = client.get_execution(started.id).steps
    assert step.status == "waiting"
    assert step.waiting is not None
    client.executions.signal(started.id, "something else", 1)
    assert client.get_execution(started.id).status == "waiting"
    client.executions.signal(started.id, "ask", {"approved": True, "by": "Ada"})
    result = client.executions.follow(started.id).wait()
    assert result.data == {"approved": True, "by": "Ada"}
    with pytest.raises(ConflictError) as caught:
        client.executions.signal(started.id, "ask")
    assert caught.value.code == "ALREADY_TERMINAL"


def check_list(client: InferPipe, ids: Workflows) -> None:
    started = [client.execute(ids.echoing, {"n": n}).id for n in range(5)]
    listed = client.executions.list(workflow_id=ids.echoing, page_size=2)
    found = list(itertools.islice(listed, 5))
    assert [one.id for one in found] == started[::-1]
    assert all((one.data, one.steps) == (None, []) for one in found)
    assert {one.status for one in client.executions.list(status="completed")} == {"completed"}
    assert not list(client.executions.list(workflow_id="no-such-workflow"))


def check_health(client: InferPipe, ids: Workflows) -> None:
    assert client.health().status == "healthy"


CHECKS = (
    check_execute,
    check_async_and_follow,
    check_stream,
    check_failure,
    check_unknown_ids,
    check_cancel,
    check_idempotency,
    check_retry,
    check_signal,
    check_list,
    check_health,
)


def shape_of(events: list[StreamEvent]) -> list[tuple[str, tuple[str, ...]]]:
    """Event types with the names of their members; a run of chunks counts as one."""
    shapes = [(event.type, tuple(sorted(event.data))) for event in events]
    return [shape for shape, _ in itertools.groupby(shapes)]


def shapes(client: InferPipe, ids: Workflows) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """How the streams of an execution that completes, and of one that fails, look."""
    return {
        "text": shape_of(events_of(client.execute_stream(ids.texting, CHAT))),
        "failure": shape_of(events_of(client.execute_stream(ids.failing, {}))),
    }


def events_of(stream: ExecutionStream) -> list[StreamEvent]:
    events = []
    with contextlib.suppress(ExecutionFailedError):
        for event in stream.events():
            events.append(event)  # noqa: PERF402 - it may raise after the last one
    return events

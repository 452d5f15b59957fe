"""What clients see: every state and event as the wire models that the SDK reads it with."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from inferpipe.wire import ExecutionRecord, ExecutionResult, SseDecoder
from serve_app.core.execution import (
    KIND_OF,
    CancelRequested,
    ChunkEmitted,
    Event,
    Execution,
    ExecutionCancelled,
    ExecutionCompleted,
    ExecutionFailed,
    ExecutionParked,
    ExecutionStarted,
    StepCompleted,
    StepFailed,
    StepRetrying,
    StepSkipped,
    StepStarted,
    evolve,
)
from serve_app.core.inference import Usage
from serve_app.core.journal import StoredEvent
from serve_app.ingress.views import (
    item_view,
    record_view,
    render_gap,
    render_sse,
    result_view,
    timestamp,
    usage_view,
)
from tests.support.workflows import (
    EXAMPLES,
    EXECUTION_ID,
    OUTPUT,
    T0,
    USAGE,
    a_step,
    a_workflow,
    an_execution,
)

AT = "2027-01-15T08:00:00.000Z"
WORKFLOW = a_workflow(a_step("first", "echo"), a_step("ran", "generate"), a_step("new", "echo"))
STARTED = ExecutionStarted(T0 + 10)
RUNNING = (STARTED, StepStarted(T0 + 20, "ran", 1))
DONE = (*RUNNING, StepCompleted(T0 + 40, "ran", OUTPUT, USAGE))
HISTORIES: dict[str, tuple[Event, ...]] = {
    "pending": (),
    "running": RUNNING,
    "retrying": (*RUNNING, StepRetrying(T0 + 60, "ran", 2, 1, T0 + 90, "broke", USAGE)),
    "waiting": (STARTED, ExecutionParked(T0 + 80, T0 + 90)),
    "cancelling": (*RUNNING, CancelRequested(T0 + 30, "enough")),
    "completed": (*DONE, StepSkipped(T0 + 41, "new"), ExecutionCompleted(T0 + 50, OUTPUT)),
    "failed": (
        *RUNNING,
        StepFailed(T0 + 40, "ran", "broke", "INTERNAL", USAGE),
        ExecutionFailed(T0 + 40, "step ran: broke", "STEP_FAILED"),
    ),
    "cancelled in the queue": (CancelRequested(T0 + 3, "x"), ExecutionCancelled(T0 + 5, "x")),
    "timed out in the queue": (ExecutionFailed(T0 + 5, "late", "TIMEOUT"),),
}


def as_json(view: object) -> object:
    return json.loads(json.dumps(view))


@pytest.mark.parametrize("history", HISTORIES)
def test_every_state_is_a_result_and_a_record_on_the_wire(history: str) -> None:
    execution = an_execution(*HISTORIES[history])
    result = ExecutionResult.model_validate(as_json(result_view(execution)))
    assert result.model_dump(mode="json") == as_json(result_view(execution))
    for workflow in (WORKFLOW, None):
        view = as_json(record_view(execution, workflow))
        record = ExecutionRecord.model_validate(view)
        assert [step.id for step in record.steps] == list(execution.steps)
        assert set(view) == {field.alias for field in ExecutionRecord.model_fields.values()}
    item = ExecutionRecord.model_validate(as_json(item_view(execution)))
    assert item.id == EXECUTION_ID
    assert {"data", "steps"}.isdisjoint(item_view(execution))


def test_a_result_says_what_the_caller_gave_and_what_became_of_it() -> None:
    assert as_json(result_view(an_execution(*HISTORIES["completed"]))) == {
        "id": EXECUTION_ID,
        "status": "completed",
        "data": OUTPUT,
        "error": None,
        "errorCode": None,
        "metadata": {"ticket": 7},
        "usage": {"promptTokens": 5, "completionTokens": 7, "totalTokens": 12},
        "timing": {"queuedMs": 10, "runMs": 40, "totalMs": 50},
        "attempts": 1,
        "workflowId": "wf",
        "workflowVersion": 3,
        "cached": False,
    }


def test_a_record_lists_the_steps_in_the_order_of_the_definition() -> None:
    events = (STARTED, StepStarted(T0 + 20, "ran", 1), StepStarted(T0 + 20, "first", 1))
    record = as_json(record_view(an_execution(*events, retry_of="exe_00old"), WORKFLOW))
    assert [(step["id"], step["type"]) for step in record["steps"]] == [
        ("first", "echo"),
        ("ran", "generate"),
    ]
    assert (record["progress"], record["retryOf"], record["userId"]) == (0, "exe_00old", "u1")
    assert (record["createdAt"], record["completedAt"]) == (AT, None)


def test_a_step_shows_its_last_error_while_it_waits_for_its_retry() -> None:
    (step,) = as_json(record_view(an_execution(*HISTORIES["retrying"]), WORKFLOW))["steps"]
    assert step == {
        "id": "ran",
        "type": "generate",
        "status": "retrying",
        "attempts": 2,
        "startedAt": "2027-01-15T08:00:00.020Z",
        "completedAt": None,
        "output": None,
        "error": "broke",
        "usage": usage_view(USAGE),
    }


def test_a_record_whose_definition_is_gone_can_be_read() -> None:
    record = as_json(record_view(an_execution(*HISTORIES["completed"]), None))
    assert [step["type"] for step in record["steps"]] == ["unknown", "unknown"]
    assert record["progress"] == 100


@pytest.mark.parametrize(
    ("history", "timing"),
    [
        ("pending", (0, 0, 0)),
        ("running", (10, 0, 0)),
        ("completed", (10, 40, 50)),
        ("cancelled in the queue", (5, 0, 5)),
        ("timed out in the queue", (5, 0, 5)),
    ],
)
def test_timing_is_zero_until_it_is_known(history: str, timing: tuple[int, int, int]) -> None:
    shown = result_view(an_execution(*HISTORIES[history]))["timing"]
    assert shown == dict(zip(("queuedMs", "runMs", "totalMs"), timing, strict=True))


def test_clocks_that_disagree_give_no_negative_times() -> None:
    execution = an_execution(ExecutionStarted(T0 - 50), ExecutionCompleted(T0 - 90, 1))
    assert result_view(execution)["timing"] == {"queuedMs": 0, "runMs": 0, "totalMs": 0}


# What a stream shows of each event; None: it is not for clients.
SHOWN: dict[str, dict[str, object] | None] = {
    "execution.created": None,
    "gate.answered": None,
    "execution.started": {"workflowId": "wf"},
    "step.started": {"step": "new", "attempt": 1},
    "map.opened": None,
    "step.waiting": None,
    "signal.received": None,
    "signal.taken": None,
    "step.progress": {"step": "ran", "progress": 37.5, "message": "reading"},
    "chunk": {"step": "ran", "data": "hi"},
    "step.resumed": None,
    "step.completed": {"step": "ran", "output": OUTPUT, "usage": usage_view(USAGE)},
    "step.skipped": None,
    "step.retrying": {
        "step": "ran",
        "attempt": 2,
        "error": "it broke",
        "retryAt": "2027-01-15T08:00:01.060Z",
    },
    "step.failed": None,
    "execution.parked": None,
    "execution.resumed": None,
    "cancel.requested": None,
    "execution.completed": {},
    "execution.failed": {},
    "execution.cancelled": {},
}
BEFORE = {
    "gate.answered": (),
    "execution.started": (),
    "execution.resumed": (STARTED, ExecutionParked(T0, T0 + 9)),
    "execution.cancelled": (*RUNNING, CancelRequested(T0, "enough")),
}


def after(event: Event) -> Execution:
    """The state after an example event."""
    kind = KIND_OF[type(event)]
    before = an_execution(*BEFORE.get(kind, RUNNING))
    return before if kind == "execution.created" else evolve(before, event)


@pytest.mark.parametrize("event", EXAMPLES.values(), ids=lambda event: KIND_OF[type(event)])
def test_every_event_streams_as_promised(event: Event) -> None:
    kind, execution = KIND_OF[type(event)], after(event)
    frame = render_sse(StoredEvent(execution.seq, "c1", event), execution)
    expected = SHOWN[kind]
    if expected is None:
        assert frame is None
        return
    assert frame is not None
    (sent,) = SseDecoder().feed(frame)
    assert (sent.event, sent.id) == (kind, str(execution.seq))
    data = json.loads(sent.data)
    if execution.is_terminal:
        result = ExecutionResult.model_validate(data)
        assert result.status == kind.removeprefix("execution.")
        expected = as_json(result_view(execution))
    stamp = {"executionId": EXECUTION_ID, "timestamp": timestamp(event.at_ms)}
    assert data == {**expected, **stamp}


def test_text_of_any_kind_stays_one_frame() -> None:
    text = 'line\nline\r\n\u2028 "quoted" é 🦊'
    stored = StoredEvent(4, "c", ChunkEmitted(T0, "ran", text))
    (sent,) = SseDecoder().feed(render_sse(stored, an_execution(*RUNNING)) or b"")
    assert json.loads(sent.data)["data"] == text


def test_a_gap_says_what_was_asked_and_what_there_is() -> None:
    (sent,) = SseDecoder().feed(render_gap(99, 3, an_execution(*RUNNING), T0))
    assert (sent.event, sent.id) == ("gap", None)
    expected = {"requested": 99, "last": 3, "executionId": EXECUTION_ID, "timestamp": AT}
    assert json.loads(sent.data) == expected


@pytest.mark.parametrize("at_ms", [0, 1, T0, T0 + 999, 4_102_444_800_123])
def test_a_timestamp_is_rfc_3339_in_utc_with_milliseconds(at_ms: int) -> None:
    text = timestamp(at_ms)
    assert text.endswith("Z")
    assert len(text) == len(AT)
    moment = datetime.fromisoformat(text)
    assert moment.tzinfo == UTC
    assert round(moment.timestamp() * 1000) == at_ms


def test_usage_adds_up_over_steps_and_attempts() -> None:
    execution = an_execution(*DONE, StepStarted(T0 + 41, "new", 1))
    execution = evolve(execution, StepCompleted(T0 + 45, "new", 1, Usage(1, 2, 0)))
    assert result_view(execution)["usage"] == {
        "promptTokens": 6,
        "completionTokens": 9,
        "totalTokens": 15,
    }
    assert usage_view(replace(USAGE, cached_tokens=99)) == usage_view(USAGE)

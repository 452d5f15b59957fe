"""The wire models: the names and bounds of the HTTP contract."""

import json
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from inferpipe import errors
from inferpipe.wire import (
    ExecuteRequest,
    ExecutionRecord,
    ExecutionResult,
    HealthStatus,
    Problem,
    RetryConfig,
)

BODY: dict[str, Any] = {
    "workflowId": "test-echo",
    "input": {"message": "hello world", "some_key": {"n": None}},
    "timeout": 120000,
    "retryConfig": {"attempts": 3, "backoff": "exponential", "maxDelay": 30000},
    "metadata": {"requestId": "r1"},
    "userId": "u1",
    "priority": -100,
    "cache": {"ttl": 300},
}
RESULT = ExecutionResult(id="e1", status="completed", workflow_id="w", workflow_version=1)


def test_execute_request_reads_the_wire_and_writes_it_back() -> None:
    request = ExecuteRequest.model_validate_json(json.dumps(BODY))
    assert request.workflow_id == "test-echo"
    assert request.retry_config == RetryConfig(attempts=3, backoff="exponential", max_delay=30000)
    assert request.model_dump() == BODY


def test_execute_request_has_these_defaults() -> None:
    request = ExecuteRequest(workflow_id="w", input={})
    assert (request.timeout, request.retry_config, request.cache) == (None, None, None)
    assert (request.metadata, request.user_id, request.priority) == ({}, None, 0)


@pytest.mark.parametrize(
    ("member", "value", "is_valid"),
    [
        ("timeout", 1, True),
        ("timeout", 0, False),
        ("timeout", -1, False),
        ("timeout", 1.5, False),
        ("timeout", "1000", False),
        ("timeout", True, False),
        ("timeout", 31_536_000_000, True),
        ("timeout", 31_536_000_001, False),
        ("priority", 100, True),
        ("priority", 101, False),
        ("priority", -101, False),
        ("retryConfig", {"attempts": 0}, True),
        ("retryConfig", {"attempts": -1}, False),
        ("retryConfig", {"attempts": 1000}, True),
        ("retryConfig", {"attempts": 1001}, False),
        ("retryConfig", {}, False),
        ("retryConfig", {"attempts": 1, "backoff": "linear"}, False),
        ("retryConfig", {"attempts": 1, "maxDelay": -1}, False),
        ("retryConfig", {"attempts": 1, "jitter": 1}, False),
        ("metadata", [], False),
        ("metadata", "text", False),
        ("input", [1], False),
        ("input", None, False),
        ("workflowId", "", False),
        ("userId", "u" * 256, True),
        ("userId", "u" * 257, False),
        ("cache", {"ttl": 0}, False),
        ("unknown", 1, False),
    ],
)
def test_execute_request_bounds(member: str, value: object, is_valid: bool) -> None:
    body = json.dumps({**BODY, member: value})
    if is_valid:
        ExecuteRequest.model_validate_json(body)
    else:
        with pytest.raises(ValidationError):
            ExecuteRequest.model_validate_json(body)


def test_execution_result_has_exactly_the_contracts_members() -> None:
    assert RESULT.model_dump(mode="json") == {
        "id": "e1",
        "status": "completed",
        "data": None,
        "error": None,
        "errorCode": None,
        "metadata": {},
        "usage": {"promptTokens": 0, "completionTokens": 0, "totalTokens": 0},
        "timing": {"queuedMs": 0, "runMs": 0, "totalMs": 0},
        "attempts": 0,
        "workflowId": "w",
        "workflowVersion": 1,
        "cached": False,
    }


def test_execution_record_adds_its_members_and_writes_utc() -> None:
    created_at = datetime(2026, 11, 21, 5, 24, tzinfo=UTC)
    record = ExecutionRecord(**RESULT.model_dump(by_alias=False), created_at=created_at)
    dump = record.model_dump(mode="json")
    assert dump.keys() - RESULT.model_dump().keys() == {
        "progress", "retryOf", "userId", "trigger", "createdAt", "startedAt", "completedAt", "steps"
    }  # fmt: skip
    assert dump["createdAt"] == "2026-11-21T05:24:00Z"


@pytest.mark.parametrize("text", ["2026-11-21T05:24:00Z", "2026-11-21T07:24:00+02:00"])
def test_timestamps_are_utc_in_pythons_own_zone(text: str) -> None:
    body = {**RESULT.model_dump(), "createdAt": text}
    created_at = ExecutionRecord.model_validate_json(json.dumps(body)).created_at
    assert created_at == datetime(2026, 11, 21, 7, 24, tzinfo=timezone(timedelta(hours=2)))
    assert created_at.tzinfo is UTC


def test_timestamp_without_a_zone_is_refused() -> None:
    with pytest.raises(ValidationError):
        ExecutionRecord.model_validate({**RESULT.model_dump(), "createdAt": "2026-11-21T05:24:00"})


def test_answers_ignore_members_of_later_servers() -> None:
    body = json.dumps({**RESULT.model_dump(mode="json"), "later": 1})
    assert ExecutionResult.model_validate_json(body) == RESULT


def test_health_keeps_further_members() -> None:
    health = HealthStatus.model_validate({"status": "healthy", "version": "1", "hosts": 2})
    assert health.model_dump() == {"status": "healthy", "version": "1", "services": {}, "hosts": 2}


def test_problem_leaves_errors_out_when_there_are_none() -> None:
    problem = Problem(title="Not Found", status=404, code="UNKNOWN_EXECUTION", request_id="r")
    assert problem.model_dump(exclude_none=True) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "",
        "code": "UNKNOWN_EXECUTION",
        "requestId": "r",
    }


@pytest.mark.parametrize(
    "error",
    [
        errors.status_error(Problem(title="t", status=429, code="C", detail="d"), 2.0),
        errors.ExecutionFailedError(RESULT.model_copy(update={"status": "failed", "error": "x"})),
        errors.InferPipeTimeoutError("slow"),
    ],
)
def test_errors_survive_pickling(error: errors.InferPipeError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, str(copy)) == (type(error), error.args, str(error))

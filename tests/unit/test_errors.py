"""Errors: one stable code each, they cross processes whole, and every code has a status."""

import inspect
import json
import pickle
from collections import Counter

import pytest

from serve_app.core import errors
from serve_app.core.errors import (
    ErrorCode,
    InvalidInputError,
    InvalidRequestError,
    InvalidWorkflowError,
    OverloadedError,
    Problem,
    ServeAppError,
    StepFailedError,
    StoreUnavailableError,
    UnauthorizedError,
    UnknownExecutionError,
)
from serve_app.ingress.errors import STATUS, problem_response

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, ServeAppError) and cls is not ServeAppError
]
PROBLEMS = (Problem(("body", "input", 0), "is no text"), Problem((), "is empty"))
# Classes with arguments beyond the message.
ARGUMENTS: dict[type[ServeAppError], tuple[object, ...]] = {
    InvalidRequestError: ("wrong shape", PROBLEMS),
    InvalidInputError: ("wrong input", PROBLEMS),
    InvalidWorkflowError: ("wrong workflow", PROBLEMS),
    StepFailedError: ("it broke", False),
}


def an_error(cls: type[ServeAppError]) -> ServeAppError:
    return cls(*ARGUMENTS.get(cls, ("what happened",)))


@pytest.mark.parametrize("cls", [ServeAppError, *CLASSES])
def test_an_error_survives_pickling(cls: type[ServeAppError]) -> None:
    error = an_error(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (again.args, again.code, str(again)) == (error.args, error.code, str(error))


def test_members_survive_pickling() -> None:
    refused = pickle.loads(pickle.dumps(InvalidInputError("wrong input", list(PROBLEMS))))
    assert refused.problems == PROBLEMS
    assert str(refused) == "wrong input"
    failed = pickle.loads(pickle.dumps(StepFailedError("it broke", False)))
    assert not failed.retryable
    assert StepFailedError("it broke").retryable
    assert InvalidRequestError("wrong shape").problems == ()


def test_no_two_classes_share_a_code() -> None:
    codes = Counter(cls.code for cls in CLASSES)
    assert [code for code, count in codes.items() if count > 1] == []


def test_every_code_is_its_own_name() -> None:
    assert [code for code in ErrorCode if code.value != code.name] == []


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(ErrorCode)
    assert all(400 <= status <= 599 for status in STATUS.values())


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("MALFORMED_JSON", 400),
        ("UNKNOWN_WORKFLOW", 404),
        ("ALREADY_TERMINAL", 409),
        ("IDEMPOTENCY_CONFLICT", 409),
        ("BODY_TOO_LARGE", 413),
        ("INVALID_INPUT", 422),
        ("RATE_LIMIT_EXCEEDED", 429),
        ("OVERLOADED", 503),
    ],
)
def test_published_statuses_never_change(code: str, status: int) -> None:
    assert STATUS[ErrorCode(code)] == status


@pytest.mark.parametrize("cls", [ServeAppError, *CLASSES])
def test_an_error_answers_as_problem_details(cls: type[ServeAppError]) -> None:
    error = an_error(cls)
    answer = problem_response(error, "req-1")
    body = json.loads(bytes(answer.body))
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == body["status"] == STATUS[error.code]
    assert (body["code"], body["detail"], body["requestId"]) == (error.code, str(error), "req-1")
    assert body["type"].startswith("urn:inferpipe:error:")
    assert ("errors" in body) == isinstance(error, InvalidRequestError)


def test_problems_are_shown_by_place_and_bounded() -> None:
    body = json.loads(bytes(problem_response(an_error(InvalidInputError), "r").body))
    assert body["errors"] == [
        {"loc": ["body", "input", 0], "msg": "is no text"},
        {"loc": [], "msg": "is empty"},
    ]
    many = InvalidRequestError("no", [Problem((index,), "x") for index in range(51)])
    assert len(json.loads(bytes(problem_response(many, "r").body))["errors"]) == 50


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (OverloadedError("full"), "retry-after", "1"),
        (StoreUnavailableError("gone"), "retry-after", "1"),
        (UnknownExecutionError("none"), "retry-after", None),
        (UnauthorizedError("who?"), "www-authenticate", "Bearer"),
    ],
)
def test_headers_tell_what_to_do(error: ServeAppError, header: str, value: str | None) -> None:
    assert problem_response(error, "r").headers.get(header) == value

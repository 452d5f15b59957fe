"""Errors as RFC 9457 problems: the one table from code to HTTP status.

Owns the status of every code and the native error body. Invariant: the table is total (a test
says so), and nothing of a stack trace leaves the process.
"""

from collections.abc import Mapping
from types import MappingProxyType

import orjson
from starlette.responses import Response

from serve_app.core.errors import (
    ErrorCode,
    InvalidRequestError,
    RateLimitExceededError,
    ServeAppError,
)

STATUS: Mapping[ErrorCode, int] = MappingProxyType(
    {
        ErrorCode.MALFORMED_JSON: 400,
        ErrorCode.INVALID_CURSOR: 400,
        ErrorCode.INVALID_PROMPT: 400,
        ErrorCode.UNAUTHORIZED: 401,
        ErrorCode.FORBIDDEN: 403,
        ErrorCode.NOT_FOUND: 404,
        ErrorCode.UNKNOWN_WORKFLOW: 404,
        ErrorCode.UNKNOWN_EXECUTION: 404,
        ErrorCode.MODEL_NOT_AVAILABLE: 404,
        ErrorCode.UNKNOWN_KEY: 404,
        ErrorCode.UNKNOWN_SESSION: 404,
        ErrorCode.UNKNOWN_WEBHOOK: 404,
        ErrorCode.UNKNOWN_DELIVERY: 404,
        ErrorCode.METHOD_NOT_ALLOWED: 405,
        ErrorCode.WORKSPACE_EXISTS: 409,
        ErrorCode.TOO_MANY_WEBHOOKS: 409,
        ErrorCode.CHANGED_MEANWHILE: 409,
        ErrorCode.ALREADY_TERMINAL: 409,
        ErrorCode.NOT_TERMINAL: 409,
        ErrorCode.TOO_MANY_SIGNALS: 409,
        ErrorCode.IDEMPOTENCY_CONFLICT: 409,
        ErrorCode.IDEMPOTENCY_IN_PROGRESS: 409,
        ErrorCode.STALE_LEASE: 409,
        ErrorCode.BODY_TOO_LARGE: 413,
        ErrorCode.INVALID_REQUEST: 422,
        ErrorCode.INVALID_INPUT: 422,
        ErrorCode.INVALID_WORKFLOW: 422,
        ErrorCode.EGRESS_REFUSED: 422,
        ErrorCode.RATE_LIMIT_EXCEEDED: 429,
        ErrorCode.STEP_FAILED: 500,
        ErrorCode.CANCELLED: 500,
        ErrorCode.ILLEGAL_TRANSITION: 500,
        ErrorCode.SEAL_BROKEN: 500,
        ErrorCode.INTERNAL: 500,
        ErrorCode.CONNECTION_FAILED: 502,
        ErrorCode.EXCHANGE_FAILED: 502,
        ErrorCode.OVERLOADED: 503,
        ErrorCode.STORE_UNAVAILABLE: 503,
        ErrorCode.NO_HOSTS_AVAILABLE: 503,
        ErrorCode.TIMEOUT: 504,
    }
)
RETRY_AFTER_S = 1  # the queues here drain in seconds
_IS_WORTH_A_RETRY = frozenset(
    {code for code, status in STATUS.items() if status in (429, 503)}
    | {ErrorCode.IDEMPOTENCY_IN_PROGRESS}
)
_PROBLEMS_SHOWN_MAX = 50


def problem_response(error: ServeAppError, request_id: str) -> Response:
    """The native error answer."""
    body = orjson.dumps(problem_body(error, request_id))
    status = STATUS[ErrorCode(error.code)]
    return Response(body, status, error_headers(error), "application/problem+json")


def problem_body(error: ServeAppError, request_id: str) -> dict[str, object]:
    """The members of the native error answer."""
    code = ErrorCode(error.code)
    body: dict[str, object] = {
        "type": f"urn:inferpipe:error:{code.lower().replace('_', '-')}",
        "title": code.replace("_", " ").capitalize(),
        "status": STATUS[code],
        "detail": str(error),
        "code": code,
        "requestId": request_id,
    }
    if isinstance(error, InvalidRequestError):
        shown = error.problems[:_PROBLEMS_SHOWN_MAX]
        body["errors"] = [{"loc": list(problem.loc), "msg": problem.msg} for problem in shown]
    return body


def error_headers(error: ServeAppError) -> dict[str, str]:
    """What an error says in headers, on every surface: when to ask again, and how to be known."""
    code = ErrorCode(error.code)
    if code is ErrorCode.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    if code not in _IS_WORTH_A_RETRY:
        return {}
    standing = error.standing if isinstance(error, RateLimitExceededError) else None
    return {"Retry-After": str(standing.reset_s if standing else RETRY_AFTER_S)}

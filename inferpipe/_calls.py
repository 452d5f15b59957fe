"""What is sent and what comes back, as values: requests and answers.

Owns the building of each HTTP call and the reading of each answer. Does no I/O, draws no number,
reads no clock. Invariant: a POST carries an `Idempotency-Key`, made once per call of the user's,
so that a repeat of it can never start a second execution.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from inferpipe._config import ExecuteOptions
from inferpipe.errors import (
    ApiStatusError,
    InferPipeProtocolError,
    InvalidArgumentError,
    status_error,
)
from inferpipe.wire import ExecuteRequest, HealthStatus, Problem

EXECUTE = "/v1/execute"
EXECUTE_ASYNC = "/v1/execute/async"
EXECUTE_STREAM = "/v1/execute/stream"

KEY_HEADER = "idempotency-key"
EXECUTE_GRACE_S = 5.0  # time-out to terminal state takes the server up to 2 s, plus the way back
STREAM_SILENCE_MAX_S = 45.0  # keep-alives come every 15 s: three missed are a dead link
DETAIL_CHARS_MAX = 200  # of a body that is not ours: enough to recognise a proxy's page

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, without the client's own headers.

    `accepts` lists statuses besides 2xx that are answers, not refusals. `patience_s` lengthens
    the client's own time-out where an answer, or its next bytes, may take that long.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    patience_s: float = 0.0
    accepts: frozenset[int] = frozenset()

    @property
    def is_repeatable(self) -> bool:
        """Whether sending it twice is the same as sending it once (RFC 9110, 9.2.2).

        PATCH is here because ours sets members to values; it adds to nothing.
        """
        return self.method != "POST" or KEY_HEADER in self.headers


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, read to its end (or, of an open stream, its head). Header names are lower."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES


def execute_call(
    path: str,
    workflow_id: str,
    workflow_input: Mapping[str, Any],
    options: ExecuteOptions,
) -> Call:
    """Build one of the three calls that start an execution.

    Raises:
        InvalidArgumentError: the server would refuse it for its shape, or it is not JSON.
        TypeError: an option that does not exist.
    """
    unknown = options.keys() - ExecuteOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    cache_ttl_s = options.get("cache_ttl_s")
    given = {
        "workflowId": workflow_id,
        "input": workflow_input,
        "timeout": options.get("timeout_ms"),
        "retryConfig": options.get("retry_config"),
        "metadata": options.get("metadata"),
        "userId": options.get("user_id"),
        "priority": options.get("priority"),
        "cache": None if cache_ttl_s is None else {"ttl": cache_ttl_s},
    }
    content = _execute_body({name: value for name, value in given.items() if value is not None})
    # The server holds this one answer back until the execution ends: do not give up before it.
    timeout_ms = options.get("timeout_ms") if path == EXECUTE else None
    headers = {"content-type": "application/json"}
    if key := options.get("idempotency_key"):
        headers[KEY_HEADER] = key
    patience_s = 0.0 if timeout_ms is None else timeout_ms / 1000 + EXECUTE_GRACE_S
    return Call("POST", path, headers, content, patience_s)


def with_key(call: Call, new_key: str) -> Call:
    """Return the call with an `Idempotency-Key`, if it is a POST that has none yet."""
    if call.method != "POST" or KEY_HEADER in call.headers:
        return call
    return replace(call, headers={**call.headers, KEY_HEADER: new_key})


def as_stream(call: Call, last_event_id: int | None = None) -> Call:
    """Return the call as one that is answered by server-sent events."""
    headers = {
        **call.headers,
        "accept": "text/event-stream",
        "accept-encoding": "identity",  # a compressing proxy would hold events back
        "cache-control": "no-store",
    }
    if last_event_id is not None:
        headers["last-event-id"] = str(last_event_id)
    return Call(call.method, call.path, headers, call.content, STREAM_SILENCE_MAX_S)


def execution_call(execution_id: str, suffix: str = "") -> Call:
    """Build a GET below one execution."""
    return Call("GET", path_below("/v1/executions", execution_id) + suffix)


def health_call() -> Call:
    """Build the health check: 503 is its answer for "not healthy", no refusal."""
    return Call("GET", "/v1/health", accepts=frozenset({HTTPStatus.SERVICE_UNAVAILABLE}))


def read_model(answer: Answer, model: type[ModelT]) -> ModelT:
    """Parse a successful answer's body.

    Raises:
        InferPipeProtocolError: it is not what this server's API promises.
    """
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise InferPipeProtocolError(
            f"status {answer.status} without a readable {model.__name__}"
            f" ({place}: {first['msg']}): is base_url an inferpipe server?"
        ) from error


def read_health(answer: Answer) -> HealthStatus:
    """Parse a health answer, whether healthy or not.

    Raises:
        ApiStatusError: the 503 comes from something in front of the server.
    """
    try:
        return read_model(answer, HealthStatus)
    except InferPipeProtocolError as error:
        if answer.is_success:
            raise
        raise refusal(answer) from error


def refusal(answer: Answer) -> ApiStatusError:
    """Turn an answer that is no success into the error to raise, whoever wrote its body."""
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValidationError:
        title = _status_title(answer.status)
        text = " ".join(answer.content[: 4 * DETAIL_CHARS_MAX].decode("utf-8", "replace").split())
        location = answer.headers.get("location")
        problem = Problem(
            title=title,
            status=answer.status,
            detail=f"redirected to {location}" if location else text[:DETAIL_CHARS_MAX],
            code="_".join(title.upper().replace("-", " ").split()),
            request_id=answer.headers.get("x-request-id"),
        )
    else:
        # The status line is what intermediaries acted on; a body that differs is only a claim.
        request_id = problem.request_id or answer.headers.get("x-request-id")
        problem = problem.model_copy(update={"status": answer.status, "request_id": request_id})
    return status_error(problem, retry_after_s(answer.headers))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read `Retry-After` (RFC 9110, 10.2.3), a date measured against the answer's own `Date`."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])  # nine digits are 31 years
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("date", ""))
    except (TypeError, ValueError):
        return None  # not given, or no date: the header is advice, never a reason to fail
    return max(0.0, wait.total_seconds())


def path_below(collection: str, an_id: str) -> str:
    """Return the path of one member of a collection.

    Raises:
        InvalidArgumentError: a dot segment, which would be resolved away and reach another route.
    """
    if an_id in {"", ".", ".."}:
        kind = collection.rpartition("/")[2].removesuffix("s")
        raise InvalidArgumentError(f"not an {kind} id: {an_id!r}")
    return f"{collection}/{quote(an_id, safe='')}"


def body_of(model: type[BaseModel], given: Mapping[str, Any]) -> bytes:
    """Return the body with the members that are given, checked as the server checks them.

    Raises:
        InvalidArgumentError: the server would refuse it for its shape, or it is not JSON.
    """
    try:
        request = model.model_validate(dict(given))
        return json_bytes(request.model_dump(exclude_unset=True), "the body")
    except ValidationError as error:
        raise InvalidArgumentError(_places(error)) from error


def json_bytes(value: object, what: str) -> bytes:
    """Return the value as JSON (RFC 8259).

    Raises:
        InvalidArgumentError: NaN, lone surrogates, cycles, objects that JSON has no form for.
    """
    try:
        return json.dumps(to_jsonable_python(value), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what} is not JSON: {error}") from error


def moment(when: datetime) -> str:
    """Return the moment as RFC 3339.

    Raises:
        InvalidArgumentError: it names no time zone, so it is no moment.
    """
    if when.tzinfo is None:
        raise InvalidArgumentError(f"{when.isoformat()} names no time zone")
    return when.isoformat()


def _execute_body(given: Mapping[str, Any]) -> bytes:
    try:
        request = ExecuteRequest.model_validate(given)
    except ValidationError as error:
        raise InvalidArgumentError(_places(error)) from error
    except RecursionError as error:
        raise InvalidArgumentError(f"the input or metadata is not JSON: {error}") from error
    # Not the request's own dump: its options would also rewrite what stands inside `input`.
    body = {**given, "input": request.input}
    if request.retry_config is not None:
        body["retryConfig"] = request.retry_config.model_dump(exclude_none=True)
    if "metadata" in given:
        body["metadata"] = request.metadata
    return json_bytes(body, "the input or metadata")


def _places(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'body'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)
    )


def _status_title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP {status}"

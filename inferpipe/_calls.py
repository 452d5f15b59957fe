"""What is sent and what comes back, as values: settings, requests, answers.

Owns the building of each HTTP call and the reading of each answer. Does no I/O, draws no number,
reads no clock. Invariant: a POST carries an `Idempotency-Key`, made once per call of the user's,
so that a repeat of it can never start a second execution.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypedDict, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from inferpipe import __version__
from inferpipe.errors import (
    ApiStatusError,
    InferPipeProtocolError,
    InvalidArgumentError,
    status_error,
)
from inferpipe.wire import ExecuteRequest, HealthStatus, Problem, RetryConfig

EXECUTE = "/v1/execute"
EXECUTE_ASYNC = "/v1/execute/async"
EXECUTE_STREAM = "/v1/execute/stream"

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_RETRIES = 2
CONNECT_TIMEOUT_MAX_S = 10.0  # a host that takes longer to shake hands is as good as down
EXECUTE_GRACE_S = 5.0  # time-out to terminal state takes the server up to 2 s, plus the way back
STREAM_SILENCE_MAX_S = 45.0  # keep-alives come every 15 s: three missed are a dead link
DETAIL_CHARS_MAX = 200  # of a body that is not ours: enough to recognise a proxy's page

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """The connection pool. `keepalive_expiry_s` is how long an idle connection is kept."""

    connections_max: int = 50
    keepalive: bool = True
    keepalive_expiry_s: float = 30.0


class ExecuteOptions(TypedDict, total=False):
    """What `execute`, `execute_async` and `execute_stream` take beside workflow and input.

    `timeout_ms` bounds the execution, queue included. `retry_config` overrides the workflow's
    `retry`. `metadata` comes back with the result. A higher `priority` (-100..100) goes first.
    `cache_ttl_s` lets an earlier result of the same input do. `idempotency_key` replaces the one
    made per call: give it to repeat a call from another process without a second execution.
    """

    timeout_ms: int | None
    retry_config: RetryConfig | Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None
    user_id: str | None
    priority: int | None
    cache_ttl_s: int | None
    idempotency_key: str | None


class ClientOptions(TypedDict, total=False):
    """What `from_env` takes; each wins over its environment variable."""

    api_key: str | None
    workspace_id: str | None
    base_url: str
    timeout: float
    retries: int
    http_options: HttpOptions | None


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """A client's settings, checked. `timeout` is in seconds."""

    api_key: str | None = field(default=None, repr=False)
    workspace_id: str | None = None
    base_url: str = DEFAULT_BASE_URL
    timeout: float = DEFAULT_TIMEOUT_S
    retries: int = DEFAULT_RETRIES
    http_options: HttpOptions = HttpOptions()

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise InvalidArgumentError(
                f"base_url must start with http:// or https:// and name a host: {self.base_url!r}"
            )
        for name, value in (("api_key", self.api_key), ("workspace_id", self.workspace_id)):
            if value is not None and not (value.isascii() and value.isprintable() and value):
                raise InvalidArgumentError(f"{name} must be printable ASCII and not empty")
        if self.timeout <= 0:
            raise InvalidArgumentError("timeout must be above 0 seconds")
        if self.retries < 0:
            raise InvalidArgumentError("retries must be 0 or more")

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        headers = {"user-agent": f"inferpipe-python/{__version__}"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        if self.workspace_id:
            headers["x-workspace-id"] = self.workspace_id
        return headers


def environment_options(environment: Mapping[str, str], given: ClientOptions) -> ClientOptions:
    """Read the three variables, below what is given; an empty one counts as unset."""
    options: ClientOptions = {}
    if api_key := environment.get("INFERPIPE_API_KEY"):
        options["api_key"] = api_key
    if workspace_id := environment.get("INFERPIPE_WORKSPACE_ID"):
        options["workspace_id"] = workspace_id
    if base_url := environment.get("INFERPIPE_BASE_URL"):
        options["base_url"] = base_url
    options.update(given)
    return options


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
        """Whether sending it twice is the same as sending it once."""
        return self.method == "GET" or "idempotency-key" in self.headers


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
    new_key: str,
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
    content = _body({name: value for name, value in given.items() if value is not None})
    # The server holds this one answer back until the execution ends: do not give up before it.
    timeout_ms = options.get("timeout_ms") if path == EXECUTE else None
    return Call(
        method="POST",
        path=path,
        headers={
            "content-type": "application/json",
            "idempotency-key": options.get("idempotency_key") or new_key,
        },
        content=content,
        patience_s=0.0 if timeout_ms is None else timeout_ms / 1000 + EXECUTE_GRACE_S,
    )


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
    return Call("GET", _execution_path(execution_id) + suffix)


def cancel_call(execution_id: str, new_key: str) -> Call:
    """Build the POST that asks for a cancellation."""
    path = _execution_path(execution_id) + "/cancel"
    return Call("POST", path, {"idempotency-key": new_key})


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


def _body(given: Mapping[str, Any]) -> bytes:
    try:
        request = ExecuteRequest.model_validate(given)
        # Not the request's own dump: its options would also rewrite what stands inside `input`.
        body = {**given, "input": request.input}
        if request.retry_config is not None:
            body["retryConfig"] = request.retry_config.model_dump(exclude_none=True)
        if "metadata" in given:
            body["metadata"] = request.metadata
        plain = to_jsonable_python(body)
        return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        )
        raise InvalidArgumentError(problems) from error
    except (ValueError, RecursionError) as error:
        # NaN, lone surrogates, cycles, objects that JSON has no form for.
        raise InvalidArgumentError(f"the input or metadata is not JSON: {error}") from error


def _execution_path(execution_id: str) -> str:
    # A dot segment would be resolved away, and reach another route.
    if execution_id in {"", ".", ".."}:
        raise InvalidArgumentError(f"not an execution id: {execution_id!r}")
    return f"/v1/executions/{quote(execution_id, safe='')}"


def _status_title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP {status}"

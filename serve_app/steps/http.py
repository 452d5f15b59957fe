"""`http`: one request to somebody else's server; its output is `{status, headers, body}`.

Owns the settings and what an answer means. Where requests may go is the client's business.
Invariant: the same attempt sends the same `Idempotency-Key`, so a server that heeds it acts once.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.core.egress import parse_target
from serve_app.core.errors import (
    DeadlineExceededError,
    EgressRefusedError,
    ExchangeFailedError,
    Problem,
    StepFailedError,
)
from serve_app.core.inference import JsonValue
from serve_app.core.step_forms import duration_ms, duration_problems, form_problems
from serve_app.core.template import expressions_in
from serve_app.ports import HttpAnswer, HttpClient, HttpRequest, StepCall, StepType

TIMEOUT_DEFAULT_MS = 30_000
RETRYABLE = frozenset({408, 429, *range(500, 600)})
_FIRST_REDIRECT, _FIRST_ERROR = 300, 400
_EXCERPT = 200  # characters of a refusing answer in the error
# Ours to say, or a way to say one thing to us and another to the server.
_REFUSED_HEADERS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade"}
)
Scalar = str | int | float | bool | None


class _Settings(BaseModel):
    """The settings once every expression has its value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    url: str = Field(min_length=1)
    headers: dict[str, str] = Field(default_factory=dict)
    query: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    json_: Any = Field(default=None, alias="json")
    body: str | None = None
    timeout: int | str = TIMEOUT_DEFAULT_MS


def http_step(client: HttpClient, answer_bytes_max: int) -> StepType:
    """The step type, bound to the one way out."""
    return StepType(check=_check, run=_runner(client, answer_bytes_max))


def _runner(
    client: HttpClient, answer_bytes_max: int
) -> Callable[[StepCall], Awaitable[JsonValue]]:
    async def run(call: StepCall) -> JsonValue:
        request = _request(call, answer_bytes_max)
        try:
            answer = await client.request(request)
        except EgressRefusedError as error:
            raise StepFailedError(str(error), False) from error  # noqa: FBT003
        except (DeadlineExceededError, ExchangeFailedError) as error:
            raise StepFailedError(str(error)) from error
        return _output(answer, answer_bytes_max)

    return run


def _request(call: StepCall, answer_bytes_max: int) -> HttpRequest:
    settings = _parse(call.settings)
    given = {name.lower() for name in settings.headers}
    headers = {name: _header(name, value) for name, value in settings.headers.items()}
    body = b"" if settings.body is None else settings.body.encode()
    if "json_" in settings.model_fields_set:
        body = json.dumps(settings.json_, ensure_ascii=False).encode()
        if "content-type" not in given:
            headers["Content-Type"] = "application/json"
    if "idempotency-key" not in given:
        headers["Idempotency-Key"] = call.idempotency_key
    return HttpRequest(
        settings.method,
        _url(settings),
        headers,
        body,
        duration_ms(settings.timeout, "timeout") / 1000,
        answer_bytes_max,
    )


def _url(settings: _Settings) -> str:
    if not settings.query:
        return settings.url
    pairs = {
        name: [_scalar(one) for one in value] if isinstance(value, list) else _scalar(value)
        for name, value in settings.query.items()
        if value is not None
    }
    parts = urlsplit(settings.url)
    query = "&".join(filter(None, (parts.query, urlencode(pairs, doseq=True))))
    return urlunsplit(parts._replace(query=query))


def _scalar(value: Scalar) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _header(name: str, value: str) -> str:
    is_plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    if not is_plain or name.lower() in _REFUSED_HEADERS:
        raise StepFailedError(f"headers: {name[:50]!r} cannot be set", False)  # noqa: FBT003
    if not all(character.isprintable() or character == "\t" for character in value):
        raise StepFailedError(f"headers: {name} holds a control character", False)  # noqa: FBT003
    return value


def _output(answer: HttpAnswer, answer_bytes_max: int) -> JsonValue:
    status = answer.status
    if status >= _FIRST_ERROR:
        text = answer.body[: 4 * _EXCERPT].decode(errors="replace")[:_EXCERPT]
        raise StepFailedError(
            f"the server answered {status}: {text}",
            status in RETRYABLE,
            _retry_after_ms(answer.headers),
        )
    if status >= _FIRST_REDIRECT:
        raise StepFailedError(f"the server answered {status}: redirects are not followed", False)  # noqa: FBT003
    if answer.is_cut:
        raise StepFailedError(
            f"the answer is larger than INFERPIPE_HTTP_ANSWER_MAX_BYTES={answer_bytes_max}",
            False,  # noqa: FBT003
        )
    return {"status": status, "headers": dict(answer.headers), "body": _body(answer)}


def _body(answer: HttpAnswer) -> JsonValue:
    """The JSON where the server says that it is some, else the text."""
    text = answer.body.decode(errors="replace")
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        try:
            parsed: JsonValue = json.loads(text)
        except ValueError as error:
            raise StepFailedError(f"the answer says it is JSON and is not: {error}") from error
        return parsed
    return text


def _retry_after_ms(headers: Mapping[str, str]) -> int | None:
    """`Retry-After` in its form of seconds; a date is told by another clock, and is left."""
    value = headers.get("retry-after", "")
    return int(value) * 1000 if value.isascii() and value.isdigit() and len(value) < 6 else None  # noqa: PLR2004 - a day


def _parse(settings: JsonValue) -> _Settings:
    problems = _own_problems(settings)
    if problems:
        place = ".".join(str(part) for part in problems[0].loc)
        raise StepFailedError(f"{place}: {problems[0].msg}", False)  # noqa: FBT003
    return _Settings.model_validate(settings)


def _own_problems(settings: JsonValue) -> list[Problem]:
    try:
        _Settings.model_validate(settings)
    except ValidationError as error:
        return [Problem(detail["loc"], detail["msg"]) for detail in error.errors(include_url=False)]
    return []


def _check(settings: JsonValue) -> Sequence[Problem]:
    """Check what is known before any input: keys, and values that hold no expression."""
    optional = ("headers", "query", "json", "body", "timeout")
    problems = form_problems("http", settings, ("method", "url"), optional)
    if problems or not isinstance(settings, Mapping):
        return problems
    if "json" in settings and "body" in settings:
        problems.append(Problem(("body",), "http takes json or body, not both"))
    literal = {key: value for key, value in settings.items() if not expressions_in(value)}
    filled = {"method": "GET", "url": "https://example.com", **literal}
    problems += _own_problems(filled)
    problems += duration_problems(settings.get("timeout", TIMEOUT_DEFAULT_MS), "timeout")
    if not problems and "url" in literal:
        try:
            parse_target(str(literal["url"]))
        except EgressRefusedError as error:
            problems.append(Problem(("url",), str(error)))
    return problems

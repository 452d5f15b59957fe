"""The one FastAPI application: middleware, error answers, routes.

Owns request ids, the access log and the mapping of every error to an answer. Builds no adapter:
its services come in ready. Invariant: no stack trace leaves the process, and every answer names
its request.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.core.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    ServeAppError,
)
from serve_app.core.limits import Standing
from serve_app.ingress.auth import Authenticator
from serve_app.ingress.errors import problem_response
from serve_app.ports import Clock, Entropy, Idempotency, KeyRing, UsageLedger, WorkflowCatalog
from serve_app.services.executions import Executions
from serve_app.services.feeds import Feeds
from serve_app.services.health import Health
from serve_app.services.inference import Inference
from serve_app.services.limits import KeyLimits
from serve_app.settings import Settings

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_EXPOSED_HEADERS = (
    "X-Request-Id",
    "X-Execution-Id",
    "Idempotency-Replayed",
    "Retry-After",
    "RateLimit-Limit",
    "RateLimit-Remaining",
    "RateLimit-Reset",
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes work with."""

    executions: Executions
    feeds: Feeds
    catalog: WorkflowCatalog
    keys: KeyRing
    idempotency: Idempotency
    usage: UsageLedger
    limits: KeyLimits
    authenticator: Authenticator
    health: Health
    inference: Inference
    clock: Clock
    entropy: Entropy
    settings: Settings
    version: str
    is_behind_serve: bool = True
    sockets: set[HTTPConnection] = field(default_factory=set)
    loose_ends: set[asyncio.Task[object]] = field(default_factory=set)

    def detached(self, work: Coroutine[object, object, Value]) -> asyncio.Task[Value]:
        """Run what must finish although its request has ended."""
        task = asyncio.get_running_loop().create_task(work)
        self.loose_ends.add(task)
        task.add_done_callback(self.loose_ends.discard)
        return task


def create_app(services: Services) -> FastAPI:
    """The application over ready services."""
    from serve_app.ingress.compat import websocket  # noqa: PLC0415 - as below
    from serve_app.ingress.routes import (  # noqa: PLC0415 - routes import Services
        decisions,
        executions,
        health,
        keys,
        stream_tokens,
        usage,
        workflows,
    )

    app = FastAPI(
        title="inferpipe",
        version=services.version,
        description="Run LLM workflows: durable executions and token streams in one service.",
        redirect_slashes=False,
    )
    app.state.services = services
    for routes in (
        executions,
        workflows,
        keys,
        decisions,
        stream_tokens,
        usage,
        health,
        websocket,
    ):
        app.include_router(routes.router)
    app.add_exception_handler(ServeAppError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    if services.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(services.settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(
        _RequestIds,
        entropy=services.entropy,
        clock=services.clock,
        is_behind_serve=services.is_behind_serve,
    )
    return app


def services_of(connection: HTTPConnection) -> Services:
    """The services of the application that a request or a socket came to."""
    services: Services = connection.app.state.services
    return services


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeAppError), "registered for this class alone"
    return problem_response(error, request.state.request_id)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for this class alone"
    refusal: ServeAppError
    if error.status_code == 405:  # noqa: PLR2004 - the status itself
        refusal = MethodNotAllowedError(f"{request.method} is not allowed here")
    elif error.status_code == 404:  # noqa: PLR2004 - the status itself
        refusal = NotFoundError(f"there is no {request.url.path}")
    else:
        refusal = InvalidRequestError(str(error.detail))
    answer = problem_response(refusal, request.state.request_id)
    answer.headers.update(error.headers or {})
    return answer


class _RequestIds:
    """Takes or makes X-Request-Id, echoes it, logs the request, and answers what nobody caught."""

    def __init__(
        self, app: ASGIApp, entropy: Entropy, clock: Clock, *, is_behind_serve: bool
    ) -> None:
        self._app = app
        self._is_behind_serve = is_behind_serve
        self._entropy = entropy
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _sent_id(scope) or self._entropy.token()
        # Serve's own middleware echoes an id that it sent on to us; ours would stand beside it.
        is_echoed = self._is_behind_serve and _sent_id(scope) is not None
        scope.setdefault("state", {})["request_id"] = request_id
        started_s = self._clock.monotonic_s()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [] if is_echoed else [(b"x-request-id", request_id.encode())]
                own += _limit_headers(scope["state"].get("standing"))
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self._answer(scope, receive, send_named, lambda: status)
        finally:
            logger.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "duration_ms": round((self._clock.monotonic_s() - started_s) * 1000, 1),
                },
            )

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, status: Callable[[], int]
    ) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception:  # the last resort: logged in full, answered in general words
            logger.exception("unhandled", extra={"request_id": scope["state"]["request_id"]})
            if status():
                raise  # the answer has begun: only cutting it off tells the client
            await _internal(scope)(scope, receive, send)


def _internal(scope: Scope) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    error = ServeAppError("internal error; the log has it under this request id")
    return problem_response(error, scope["state"]["request_id"])


def _limit_headers(standing: Standing | None) -> list[tuple[bytes, bytes]]:
    if standing is None:
        return []
    values = {
        b"ratelimit-limit": standing.count_max,
        b"ratelimit-remaining": standing.remaining,
        b"ratelimit-reset": standing.reset_s,
    }
    return [(name, str(value).encode()) for name, value in values.items()]


def _sent_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            return text if _REQUEST_ID.fullmatch(text) else None
    return None

"""The one FastAPI application: its services, its routes, and its answers to errors.

Owns which routes there are and the mapping of every error to an answer; `middleware` has what all
requests pass. Builds no adapter: its services come in ready.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from serve_app.core.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    RateLimitExceededError,
    ServeAppError,
)
from serve_app.ingress.auth import Authenticator
from serve_app.ingress.errors import problem_response
from serve_app.ingress.middleware import Observed
from serve_app.ingress.openapi import openapi_of, operation_id
from serve_app.ports import (
    Clock,
    Entropy,
    Idempotency,
    KeyRing,
    MetricsPage,
    OpenAiServing,
    RequestMetrics,
    UsageLedger,
    WorkflowCatalog,
)
from serve_app.services.events import Events
from serve_app.services.executions import Executions
from serve_app.services.feeds import Feeds
from serve_app.services.health import Health
from serve_app.services.hooks import Hooks
from serve_app.services.hosts import Hosts
from serve_app.services.inference import Inference
from serve_app.services.limits import KeyLimits
from serve_app.services.sessions import Sessions
from serve_app.services.webhooks import Webhooks
from serve_app.settings import Settings

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
    events: Events
    hooks: Hooks
    webhooks: Webhooks
    authenticator: Authenticator
    health: Health
    request_metrics: RequestMetrics
    metrics_page: MetricsPage
    inference: Inference
    sessions: Sessions
    hosts: Hosts
    openai: OpenAiServing | None
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
    from serve_app.ingress.compat import events, openai, websocket  # noqa: PLC0415 - as below
    from serve_app.ingress.routes import (  # noqa: PLC0415 - routes import Services
        decisions,
        executions,
        health,
        hooks,
        hosts,
        keys,
        metrics,
        sessions,
        signals,
        stream_tokens,
        usage,
        webhooks,
        workflows,
    )

    app = FastAPI(
        title="inferpipe",
        version=services.version,
        description="Run LLM workflows: durable executions and token streams in one service.",
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
    )
    app.openapi = partial(openapi_of, app)  # type: ignore[method-assign] # FastAPI's documented way
    app.state.services = services
    for routes in (
        executions,
        signals,
        hooks,
        workflows,
        keys,
        decisions,
        stream_tokens,
        usage,
        webhooks,
        health,
        metrics,
        hosts,
        sessions,
        websocket,
        openai,
        events,
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
        Observed,
        entropy=services.entropy,
        clock=services.clock,
        metrics=services.request_metrics,
        is_behind_serve=services.is_behind_serve,
    )
    return app


def services_of(connection: HTTPConnection) -> Services:
    """The services of the application that a request or a socket came to."""
    services: Services = connection.app.state.services
    return services


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeAppError), "registered for this class alone"
    if isinstance(error, RateLimitExceededError) and error.standing is not None:
        request.state.standing = error.standing  # a workflow's limit refused, not the key's
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

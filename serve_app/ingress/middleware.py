"""What every request passes: its id, its headers, its log line, its count, and the last resort.

Owns X-Request-Id, the RateLimit headers, the access log and the answer to what nobody caught.
Invariants: every answer names its request, no stack trace leaves the process, and no query is
logged, because a stream token may stand in it.
"""

import logging
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.core.errors import ServeAppError
from serve_app.core.limits import Standing
from serve_app.ingress.errors import problem_response
from serve_app.ports import Clock, Entropy, RequestMetrics

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NO_ROUTE = "none"  # one label value for all paths that do not exist


class Observed:
    """The outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        entropy: Entropy,
        clock: Clock,
        metrics: RequestMetrics,
        *,
        is_behind_serve: bool,
    ) -> None:
        self._app = app
        self._entropy = entropy
        self._clock = clock
        self._metrics = metrics
        self._is_behind_serve = is_behind_serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = _sent_id(scope)
        scope.setdefault("state", {})["request_id"] = sent_id or self._entropy.token()
        # Serve's own middleware echoes an id that it sent on to us; ours would stand beside it.
        is_echoed = self._is_behind_serve and sent_id is not None
        exchange = _Exchange(scope, send, self._clock, self._metrics, is_echoed=is_echoed)
        try:
            await self._answer(scope, receive, exchange)
        finally:
            exchange.ended()

    async def _answer(self, scope: Scope, receive: Receive, exchange: "_Exchange") -> None:
        request_id = scope["state"]["request_id"]
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:  # the last resort: logged in full, answered in general words
            logger.exception("unhandled", extra={"request_id": request_id})
            if exchange.status:
                raise  # the answer has begun: only cutting it off tells the client
            error = ServeAppError("internal error; the log has it under this request id")
            await problem_response(error, request_id)(scope, receive, exchange.send)


class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        scope: Scope,
        send: Send,
        clock: Clock,
        metrics: RequestMetrics,
        *,
        is_echoed: bool,
    ) -> None:
        self.status = 0
        self._scope = scope
        self._send = send
        self._clock = clock
        self._metrics = metrics
        self._is_echoed = is_echoed
        self._is_stream = False
        self._started_s = clock.monotonic_s()
        self._first_byte_s: float | None = None

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._first_byte_s = self._clock.monotonic_s() - self._started_s
            headers = list(message.get("headers", ()))
            if (b"content-type", b"text/event-stream; charset=utf-8") in headers:
                self._is_stream = True
                self._metrics.stream_opened()
            message["headers"] = headers + self._own_headers()
        await self._send(message)

    def ended(self) -> None:
        """Log and count."""
        route = self._scope.get("route")
        if self._is_stream:
            self._metrics.stream_closed()
        self._metrics.request_answered(
            self._scope["method"],
            getattr(route, "path", _NO_ROUTE),
            self.status,
            self._first_byte_s,
        )
        logger.info(
            "request",
            extra={
                "request_id": self._scope["state"]["request_id"],
                "method": self._scope["method"],
                "path": self._scope["path"],
                "status": self.status,
                "duration_ms": round((self._clock.monotonic_s() - self._started_s) * 1000, 1),
            },
        )

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        state = self._scope["state"]
        own = [] if self._is_echoed else [(b"x-request-id", state["request_id"].encode())]
        standing: Standing | None = state.get("standing")
        if standing is not None:
            values = {
                b"ratelimit-limit": standing.count_max,
                b"ratelimit-remaining": standing.remaining,
                b"ratelimit-reset": standing.reset_s,
            }
            own += [(name, str(value).encode()) for name, value in values.items()]
        return own


def _sent_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            return text if _REQUEST_ID.fullmatch(text) else None
    return None

"""`/v1/ws`: answers token by token on a socket, many requests at once.

Owns the protocol of `docs/websocket.md`: who speaks, what a message means, the order of answers,
and what one socket may cost. Invariant: a socket has one writer at a time and no queue. A request
waits with its next piece until the socket takes it, and the token link merges what arrives
meanwhile, so that a slow client costs one answer's text per request and hurts nobody else. When
the socket ends, for whatever reason, all its generations end, down to the engine.

Pings, permessage-deflate and the closing of all sockets with 1012 on a restart are the HTTP
server's (uvicorn's: a ping each 20 s, 20 s for its answer).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import orjson
from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from inferpipe.wire import (
    AuthMessage,
    CancelMessage,
    ClientMessage,
    InferenceMessage,
)
from serve_app.core.auth import Principal, Scope
from serve_app.core.errors import (
    BodyTooLargeError,
    DeadlineExceededError,
    InvalidRequestError,
    RateLimitExceededError,
    ServeAppError,
    UnauthorizedError,
)
from serve_app.core.inference import (
    ANYWHERE,
    GenerationRequest,
    Message,
    Placement,
)
from serve_app.ingress.app import Services, services_of
from serve_app.ingress.bodies import parse_json
from serve_app.ingress.socket_call import SocketCall
from serve_app.ingress.socket_messages import (
    Json,
    RefusedMessageError,
    check_size,
    error_message,
    parse_message,
    piece_message,
    request_id_of,
)

router = APIRouter()
logger = logging.getLogger(__name__)

# Close codes: RFC 6455, section 7.4.1, and the IANA registry.
CLOSE_NORMAL = 1000
CLOSE_ABNORMAL = 1006
CLOSE_POLICY = 1008
CLOSE_TOO_BIG = 1009
CLOSE_TRY_LATER = 1013


@router.websocket("/v1/ws")
async def any_host(socket: WebSocket) -> None:
    """A socket whose requests go where the router sends them."""
    await _SocketClient(socket, None).serve()


@router.websocket("/hosts/{host_id}/v1/ws")
async def one_host(socket: WebSocket, host_id: str) -> None:
    """A socket whose requests go to one host."""
    await _SocketClient(socket, host_id).serve()


class _CloseError(Exception):
    """Ends the socket with a close code and a reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class _SocketClient:
    """A socket, its client and their requests."""

    def __init__(self, socket: WebSocket, host_id: str | None) -> None:
        self._socket = socket
        self._services: Services = services_of(socket)
        self._settings = self._services.settings
        self._placement = ANYWHERE if host_id is None else Placement(host=host_id)
        self._principal: Callable[[], Awaitable[Principal]] = self._named_by_headers
        self._calls: dict[str | None, SocketCall] = {}
        self._alive_count = 0  # with those whose last message the socket has not taken yet
        self._writing = asyncio.Lock()  # first come, first served: nobody starves
        self._group = asyncio.TaskGroup()

    async def serve(self) -> None:
        """Serve the socket until one side closes it."""
        await self._socket.accept()
        sockets = self._services.sockets
        if len(sockets) >= self._settings.sockets_max:
            await self._close(_CloseError(CLOSE_TRY_LATER, "too many sockets; try again later"))
            return
        sockets.add(self._socket)
        try:
            async with self._group:
                await self._identify()
                await self._read()
        except* WebSocketDisconnect:
            pass  # the tasks of its requests are cancelled with the group
        except* _CloseError as closing:
            error = closing.exceptions[0]
            assert isinstance(error, _CloseError), "nobody wraps it in a group of its own"
            await self._close(error)
        finally:
            sockets.discard(self._socket)

    async def _identify(self) -> None:
        """Learn who speaks: by the headers, or by a first message where they say nothing.

        Raises:
            _CloseError: nobody we know, or nobody in time.
        """
        try:
            if self._services.authenticator.is_anonymous(self._socket):
                async with asyncio.timeout(self._settings.socket_auth_s):
                    message = await self._receive()
                if not isinstance(message, AuthMessage):
                    raise UnauthorizedError("send {type: auth, api_key} first")
                await self._authenticate(message)
            else:
                principal = await self._principal()
                if not self._services.authenticator.has_key(self._socket):
                    # A stream token's life bounds the handshake, not the socket.
                    self._principal = _fixed(principal)
        except TimeoutError:
            raise _CloseError(CLOSE_POLICY, "no auth message in time") from None
        except (ServeAppError, RefusedMessageError) as caught:
            error = caught.error if isinstance(caught, RefusedMessageError) else caught
            await self._refuse(error, None)
            raise _CloseError(CLOSE_POLICY, "not authenticated") from error

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._settings.socket_idle_s):
                    message = await self._receive()
            except TimeoutError:
                if not self._alive_count:
                    raise _CloseError(CLOSE_NORMAL, "idle") from None
                continue
            except RefusedMessageError as refusal:
                await self._refuse(refusal.error, refusal.request_id)
                if isinstance(refusal.error, BodyTooLargeError):
                    raise _CloseError(CLOSE_TOO_BIG, "the message is too large") from None
                continue
            await self._heed(message)

    async def _heed(self, message: ClientMessage) -> None:
        try:
            match message:
                case InferenceMessage():
                    await self._start(message)
                case CancelMessage(request_id=request_id):
                    self._cancel(request_id)
                case AuthMessage():
                    await self._authenticate(message)
        except UnauthorizedError as error:
            await self._refuse(error, getattr(message, "request_id", None))
            raise _CloseError(CLOSE_POLICY, "not authenticated") from error
        except ServeAppError as error:
            await self._refuse(error, getattr(message, "request_id", None))

    async def _authenticate(self, message: AuthMessage) -> None:
        def named_by_message() -> Awaitable[Principal]:
            return self._services.authenticator.principal(
                self._socket, Scope.EXECUTE, message.api_key
            )

        await named_by_message()
        self._principal = named_by_message
        await self._send({"type": "auth_ok"})

    def _named_by_headers(self) -> Awaitable[Principal]:
        return self._services.authenticator.principal(self._socket, Scope.EXECUTE)

    async def _start(self, message: InferenceMessage) -> None:
        # Asked again for each request: a key that was revoked meanwhile is refused.
        principal = await self._principal()
        if message.request_id in self._calls:
            known = "of this id" if message.request_id else "without a request_id"
            raise InvalidRequestError(f"a request {known} is running on this socket")
        await self._services.limits.check(principal)
        if self._alive_count >= self._settings.socket_requests_max:
            raise RateLimitExceededError(
                f"{self._settings.socket_requests_max} requests run on this socket already"
            )
        entropy = self._services.entropy
        call = SocketCall(entropy.token(), message.request_id, message.request, principal)
        self._calls[call.request_id] = call
        self._alive_count += 1
        call.task = self._group.create_task(self._answer(call))

    def _cancel(self, request_id: str | None) -> None:
        call = self._calls.get(request_id)
        if call is None or call.is_cancelled or call.is_complete:
            return  # its last message is on the way
        call.is_cancelled = True
        if call.task is not None and call.is_started:
            call.task.cancel()

    async def _answer(self, call: SocketCall) -> None:
        call.is_started = True
        try:
            last = await self._outcome(call)
            self._calls.pop(call.request_id, None)
            for message in last:
                await self._send(message)
        finally:
            self._alive_count -= 1
            if call.usage.total_tokens:
                # The client, and this task with it, may be gone; the bill is not.
                self._services.detached(
                    self._services.usage.add(call.spending(self._services.clock.now_ms()))
                )

    async def _outcome(self, call: SocketCall) -> list[Json]:
        """Run a request; the messages it ends with."""
        try:
            if call.is_cancelled:
                return call.cancelled()
            timeout_ms = call.wish.timeout or self._settings.timeout_default_ms
            async with asyncio.timeout(timeout_ms / 1000):
                return await self._generate(call, self._services.clock.now_ms() + timeout_ms)
        except asyncio.CancelledError:
            if not call.is_cancelled:
                raise
            return call.cancelled()
        except (_CloseError, WebSocketDisconnect):
            raise
        except TimeoutError:
            error: ServeAppError = DeadlineExceededError("the timeout passed before the last token")
        except ServeAppError as caught:
            error = caught
        except Exception:
            logger.exception("a socket's request failed")
            error = ServeAppError("internal error; the log has it")
        return call.failed(error)

    async def _generate(self, call: SocketCall, deadline_ms: int) -> list[Json]:
        wish = call.wish
        if wish.session_id is None:
            await self._stream(call, call.generation((Message("user", wish.prompt),), deadline_ms))
            return call.ended()
        sessions = self._services.sessions
        workspace = call.principal.workspace
        async with sessions.turn(workspace, wish.session_id, wish.prompt) as turn:
            if wish.model not in {"", turn.session.model}:
                raise InvalidRequestError(f"the session's model is {turn.session.model!r}")
            request = call.generation(turn.messages(wish.prompt), deadline_ms)
            await self._stream(call, replace(request, model=turn.session.model))
            if call.is_complete:
                # Before the client hears of the end: what it has seen end is kept.
                await sessions.keep(turn, wish.prompt, call.text)
        return call.ended()

    async def _stream(self, call: SocketCall, request: GenerationRequest) -> None:
        """Send the pieces of an answer but the last, which waits for what must come before it."""
        async with aclosing(self._services.inference.generate(request, self._placement)) as chunks:
            async for chunk in chunks:
                call.take(chunk)
                if chunk.finish_reason is None and call.wish.stream:
                    call.has_spoken = True
                    await self._send(piece_message(call.request_id, chunk.text))

    async def _receive(self) -> ClientMessage:
        """The next message.

        Raises:
            RefusedMessageError: it is none of the protocol's.
            WebSocketDisconnect: the client has gone.
        """
        event = await self._socket.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", CLOSE_NORMAL))
        request_id = None
        try:
            text = event.get("text")
            if text is None:
                raise InvalidRequestError("send text frames, one JSON object each")
            data = text.encode("utf-8", "surrogatepass")
            value = parse_json(data, self._settings.json_depth_max)
            request_id = request_id_of(value)
            message = parse_message(value)
            check_size(message, len(data), self._settings.socket_message_bytes_max)
        except ServeAppError as error:
            raise RefusedMessageError(error, request_id) from error
        return message

    async def _refuse(self, error: ServeAppError, request_id: str | None) -> None:
        await self._send(error_message(error, request_id))

    async def _send(self, message: Json) -> None:
        """Send one message, when it is its turn and the socket takes it.

        Raises:
            _CloseError: the client has not read for too long.
        """
        text = orjson.dumps(message).decode()
        async with self._writing:
            try:
                async with asyncio.timeout(self._settings.socket_stall_s):
                    await self._socket.send_text(text)
            except TimeoutError:
                raise _CloseError(CLOSE_POLICY, "the client does not read") from None
            except RuntimeError as error:  # the server itself has closed: a ping had no answer
                raise WebSocketDisconnect(CLOSE_ABNORMAL) from error

    async def _close(self, error: _CloseError) -> None:
        # The frame waits like any other while the client does not read; then the connection ends
        # without one.
        try:
            async with asyncio.timeout(1):
                await self._socket.close(error.code, error.reason)
        except (TimeoutError, WebSocketDisconnect, RuntimeError):
            logger.info("socket closed without a close frame", extra={"reason": error.reason})


def _fixed(principal: Principal) -> Callable[[], Awaitable[Principal]]:
    async def named() -> Principal:
        return principal

    return named

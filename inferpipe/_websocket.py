"""One socket to one host, shared by many requests.

Owns the connection, who on it gets which message, and what its end means to those that wait. Sends
nothing twice. Invariant: a request that is left is cancelled at the server, and no slow reader of
one answer holds up another's: beyond its buffer, pieces of an answer merge.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Self

from pydantic import TypeAdapter, ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException

from inferpipe.errors import (
    CONNECTION_FAILED,
    ConnectionFailedError,
    InferPipeError,
    InferPipeProtocolError,
    InvalidArgumentError,
    inference_error,
)
from inferpipe.wire import (
    CancelMessage,
    ChunkMessage,
    EndMessage,
    ErrorMessage,
    InferenceMessage,
    ServerMessage,
    SocketInference,
)

MESSAGE_BYTES_MAX = 64 << 20  # far above any answer in one piece
_MESSAGES: TypeAdapter[ServerMessage] = TypeAdapter(ServerMessage)


class NotSentError(ConnectionFailedError):
    """The connection failed before the request was on it: the server has not heard of it."""


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """How to connect.

    Args:
        connection_timeout: ms for the connection and its handshake.
        stream_buffer_size: pieces of one answer that wait for their reader; more merge.
        compression_enabled: offer permessage-deflate.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    connection_timeout: int = 30_000
    stream_buffer_size: int = 100
    compression_enabled: bool = True


class WebSocketClient:
    """A socket to one host; tasks of one event loop may share it.

    Args:
        url: `ws://…/v1/ws` or `wss://…/v1/ws`.
        options: the key is among its headers.
    """

    def __init__(self, url: str, options: SocketOptions | None = None) -> None:
        self.url = url
        self._options = options or SocketOptions()
        self._connection: ClientConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._inboxes: dict[str, _Inbox] = {}
        self._ids = count()

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return self._reading is not None and not self._reading.done()

    async def connect(self) -> None:
        """Open the connection.

        Raises:
            ConnectionFailedError: the host cannot be reached, or speaks another protocol.
            InvalidArgumentError: the address is none.
        """
        options = self._options
        try:
            self._connection = await connect(
                self.url,
                additional_headers=options.headers,
                open_timeout=options.connection_timeout / 1000,
                compression="deflate" if options.compression_enabled else None,
                max_size=MESSAGE_BYTES_MAX,
            )
        except InvalidURI as error:
            raise InvalidArgumentError(f"no WebSocket address: {self.url!r}") from error
        except (OSError, TimeoutError, WebSocketException) as error:
            reason = f"cannot connect to {self.url}: {error}"
            raise NotSentError(CONNECTION_FAILED, reason) from error
        # Not in a TaskGroup: it serves every request of the socket, and `aclose` ends it.
        self._reading = asyncio.get_running_loop().create_task(self._read(self._connection))

    async def answer(
        self, request: SocketInference
    ) -> AsyncGenerator[ChunkMessage | EndMessage, None]:
        """Yield the messages of one answer; leaving early cancels it at the server.

        Raises:
            InferenceError: what the server says, by its code.
            ConnectionFailedError: the connection ended before the answer.
        """
        if self._connection is None or not self.is_open:
            raise NotSentError(CONNECTION_FAILED, f"not connected to {self.url}")
        request_id = f"r{next(self._ids)}"
        inbox = self._inboxes[request_id] = _Inbox(self._options.stream_buffer_size)
        is_over = False
        try:
            await self._send(InferenceMessage(request_id=request_id, request=request))
            while True:
                try:
                    message = await inbox.next()
                except InferPipeError:
                    is_over = True
                    raise
                yield message
                if isinstance(message, EndMessage):
                    is_over = True
                    return
        finally:
            del self._inboxes[request_id]
            if not is_over and self.is_open:
                await self._send(CancelMessage(request_id=request_id))

    async def aclose(self) -> None:
        """Close the connection; the server cancels what runs on it."""
        if self._connection is not None:
            await self._connection.close()
        if self._reading is not None:
            await self._reading

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _send(self, message: InferenceMessage | CancelMessage) -> None:
        assert self._connection is not None, "answers begin on an open connection"
        try:
            await self._connection.send(message.model_dump_json(exclude_none=True))
        except ConnectionClosed as error:
            raise NotSentError(CONNECTION_FAILED, f"the socket closed: {error}") from error

    async def _read(self, connection: ClientConnection) -> None:
        failure: InferPipeError = ConnectionFailedError(CONNECTION_FAILED, "the socket was closed")
        try:
            async for data in connection:
                told = self._deliver(_MESSAGES.validate_json(data))
                failure = told or failure
        except ConnectionClosed as error:
            if isinstance(failure, ConnectionFailedError):
                failure = ConnectionFailedError(CONNECTION_FAILED, f"the socket closed: {error}")
        except ValidationError as error:
            failure = InferPipeProtocolError(f"the host speaks another protocol: {error}")
            await connection.close()
        for inbox in self._inboxes.values():
            inbox.fail(failure)

    def _deliver(self, message: ServerMessage) -> InferPipeError | None:
        """Give a message to whom it is for; return what it says of the whole socket."""
        error = None
        if isinstance(message, ErrorMessage):
            error = inference_error(message.error.code, message.error.message)
        inbox = self._inboxes.get(getattr(message, "request_id", None) or "")
        if inbox is not None and error is not None:
            inbox.fail(error)
        elif inbox is not None and isinstance(message, ChunkMessage | EndMessage):
            inbox.put(message)
        elif isinstance(message, ErrorMessage) and message.request_id is None:
            return error
        return None


class _Inbox:
    """Messages of one answer on their way to its reader."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._waiting: deque[ChunkMessage | EndMessage] = deque()
        self._failure: InferPipeError | None = None
        self._has_news = asyncio.Event()

    def put(self, message: ChunkMessage | EndMessage) -> None:
        last = self._waiting[-1] if len(self._waiting) >= self._size_max else None
        if isinstance(message, ChunkMessage) and isinstance(last, ChunkMessage):
            merged = {"content": last.content + message.content}
            self._waiting[-1] = message.model_copy(update=merged)
        else:
            self._waiting.append(message)
        self._has_news.set()

    def fail(self, error: InferPipeError) -> None:
        self._failure = self._failure or error
        self._has_news.set()

    async def next(self) -> ChunkMessage | EndMessage:
        """The next message; what came before a failure is handed out first."""
        await self._has_news.wait()
        if self._waiting:
            message = self._waiting.popleft()
            if not self._waiting and self._failure is None:
                self._has_news.clear()
            return message
        assert self._failure is not None, "there is news, or there is none"
        raise self._failure

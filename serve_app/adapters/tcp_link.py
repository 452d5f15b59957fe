"""The caller's side of the token links: one persistent connection per replica, many streams on it.

Owns the connections and the streams' slots. Does not choose replicas and does not retry: a broken
link raises `ConnectionFailedError` at once and the caller asks the router again. Invariant: a
stream that its consumer left is cancelled at the replica, whatever made the consumer leave.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from serve_app.adapters.metrics import links_changed
from serve_app.adapters.tcp_link_protocol import LinkProtocol
from serve_app.adapters.tcp_link_wire import (
    VERSION,
    Answer,
    Call,
    DeltaSlot,
    Item,
    LinkSettings,
    WireError,
    call_start,
    join_frame,
    pack_frame,
    pack_item,
    proof,
    read_chunk,
    read_error,
)
from serve_app.core.errors import (
    ConnectionFailedError,
    InvalidPromptError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.inference import Chunk, GenerationRequest, Grant
from serve_app.ports import Clock, Entropy

FRAME_HEAD_BYTES = 5  # the list header of a frame, at the most

logger = logging.getLogger(__name__)

Address = tuple[str, int]


class TcpTokenLink:
    """Streams answers from replicas; one per process and event loop."""

    def __init__(
        self, secret: bytes, clock: Clock, entropy: Entropy, settings: LinkSettings | None = None
    ) -> None:
        self._secret = secret
        self._clock = clock
        self._entropy = entropy
        self._settings = settings or LinkSettings()
        self._connections: dict[Address, _ClientConnection] = {}
        self._attempts: dict[Address, asyncio.Task[_ClientConnection]] = {}
        self._is_closed = False

    async def generate(self, grant: Grant, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        """Stream the answer; see `ports.TokenLink`.

        Raises:
            InvalidPromptError: the request does not fit into a frame.
        """
        connection = await self._connection((grant.host, grant.port))
        stream = connection.open(grant, request)
        try:
            while True:
                chunk = await stream.next()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            connection.leave(stream)

    async def close(self) -> None:
        """Break every connection off; open streams raise `ConnectionFailedError`."""
        self._is_closed = True
        attempts = tuple(self._attempts.values())
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
        for connection in tuple(self._connections.values()):
            connection.break_off("the link was closed")

    async def _connection(self, address: Address) -> "_ClientConnection":
        if (connection := self._connections.get(address)) is not None:
            return connection
        if self._is_closed:
            raise ConnectionFailedError("the link is closed")
        attempt = self._attempts.get(address)
        if attempt is None:
            # A task of its own, because an opener that is cancelled must not cancel the others'
            # attempt; it ends by its own time-out and `close` ends it earlier.
            attempt = asyncio.create_task(self._connect(address))  # noqa: TID251
            self._attempts[address] = attempt
        return await asyncio.shield(attempt)

    async def _connect(self, address: Address) -> "_ClientConnection":
        connection = _ClientConnection(
            self._secret,
            self._entropy.token().encode(),
            self._clock,
            self._settings,
            lambda: self._forget(address, connection),
        )
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(lambda: connection, *address)
                await connection.proven.wait()
            if connection.is_closed:
                raise ConnectionFailedError(f"no link to the replica: {connection.reason}")
        except TimeoutError as error:
            connection.break_off("the hello took too long")
            raise ConnectionFailedError("the replica did not answer in time") from error
        except OSError as error:
            raise ConnectionFailedError(f"the replica cannot be reached: {error}") from error
        except asyncio.CancelledError:
            connection.break_off("the link was closed")
            raise
        finally:
            del self._attempts[address]
        self._connections[address] = connection
        links_changed(len(self._connections))
        return connection

    def _forget(self, address: Address, connection: "_ClientConnection") -> None:
        if self._connections.get(address) is connection:
            del self._connections[address]
            links_changed(len(self._connections))


class _ClientStream:
    """One answer on its way to one consumer: a slot that merges, and its wake-up."""

    __slots__ = ("_error", "_slot", "_waiter", "stream_id")

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self._slot = DeltaSlot()
        self._error: ServeAppError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def feed(self, chunk: Chunk) -> None:
        self._slot.add(chunk)
        self._wake()

    def fail(self, error: ServeAppError) -> None:
        self._error = error
        self._wake()

    async def next(self) -> Chunk:
        """Everything since the last call; what came before an error is handed out first."""
        while self._slot.is_empty:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._slot.take()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _ClientConnection(LinkProtocol):
    def __init__(
        self,
        secret: bytes,
        nonce: bytes,
        clock: Clock,
        settings: LinkSettings,
        forget: Callable[[], None],
    ) -> None:
        super().__init__(clock, settings)
        self.proven = asyncio.Event()  # also set when the connection closed before
        self._secret = secret
        self._nonce = nonce
        self._server_nonce: bytes | None = None
        self._forget = forget
        self._streams: dict[int, _ClientStream] = {}
        self._stream_count = 0
        self._outbox: list[bytes] = []
        self._outbox_bytes = FRAME_HEAD_BYTES
        self._ping: asyncio.TimerHandle | None = None

    def open(self, grant: Grant, request: GenerationRequest) -> _ClientStream:
        """Start a stream.

        Raises:
            ConnectionFailedError: the connection is gone.
            OverloadedError: too many streams are open.
            InvalidPromptError: the request is too large for a frame, or cannot be packed.
        """
        if self.is_closed:
            raise ConnectionFailedError(self.reason)
        if len(self._streams) >= self.settings.streams_max:
            raise OverloadedError("too many streams are open to this replica")
        stream_id = self._stream_count
        try:
            packed = pack_item(call_start(stream_id, grant, request))
        except ValueError as error:
            raise InvalidPromptError(f"the request cannot be sent: {error}") from error
        if len(packed) + FRAME_HEAD_BYTES > self.settings.frame_bytes_max:
            limit = self.settings.frame_bytes_max
            raise InvalidPromptError(f"the request is over the limit of {limit} bytes")
        self._stream_count += 1
        stream = _ClientStream(stream_id)
        self._streams[stream_id] = stream
        self._push(packed)
        return stream

    def leave(self, stream: _ClientStream) -> None:
        """The consumer is done; a stream that has not ended is cancelled at the replica."""
        if self._streams.pop(stream.stream_id, None) is not None and not self.is_closed:
            self._push(pack_item([Call.CANCEL, stream.stream_id]))

    def opened(self) -> None:
        self._ping_later()

    def closed(self) -> None:
        self._forget()
        if self._ping is not None:
            self._ping.cancel()
        self.proven.set()
        streams, self._streams = tuple(self._streams.values()), {}
        for stream in streams:
            stream.fail(ConnectionFailedError(f"the link to the replica broke: {self.reason}"))

    def frame_received(self, items: list[Any]) -> None:
        if not self.proven.is_set():
            self._continue_hello(items)
            return
        for item in items:
            self._handle(item)

    def flush(self) -> None:
        if self._outbox:
            self.send(join_frame(self._outbox))
            self._outbox.clear()
            self._outbox_bytes = FRAME_HEAD_BYTES

    def _push(self, packed: bytes) -> None:
        if self._outbox_bytes + len(packed) > self.settings.frame_bytes_max:
            self.flush()
        self._outbox.append(packed)
        self._outbox_bytes += len(packed)
        self.schedule_flush()

    def _continue_hello(self, items: list[Any]) -> None:
        match items:
            case [int(version), bytes(nonce)] if version == VERSION and self._server_nonce is None:
                self._server_nonce = nonce
                claim = proof(self._secret, b"client", nonce, self._nonce)
                self.send(pack_frame([VERSION, self._nonce, claim]))
            case [bytes(claim)] if self._server_nonce is not None:
                wanted = proof(self._secret, b"server", self._server_nonce, self._nonce)
                if not hmac.compare_digest(wanted, claim):
                    raise WireError("the replica does not know the cluster secret")
                self.trust_peer()
                self.proven.set()
            case _:
                raise WireError("the hello has another layout or version")

    def _handle(self, item: Item) -> None:
        match item:
            case [Answer.DELTA, stream_id, *_]:
                if (stream := self._streams.get(stream_id)) is not None:
                    stream.feed(read_chunk(item))
            case [Answer.END, stream_id, *_]:
                if (stream := self._streams.pop(stream_id, None)) is not None:
                    stream.feed(read_chunk(item))
            case [Answer.ERROR, stream_id, str(code), str(message)]:
                if (stream := self._streams.pop(stream_id, None)) is not None:
                    stream.fail(read_error(code, message))
            case [Answer.PONG]:
                pass  # data_received has noted that the peer lives
            case _:
                raise WireError("an item of an unknown kind")

    def _ping_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._ping = loop.call_later(self.settings.ping_interval_s, self._ping_now)

    def _ping_now(self) -> None:
        # Idle connections are pinged too, so that a request never meets one whose peer vanished.
        if self.silence_s() > self.settings.silence_max_s:
            self.break_off("the replica was silent for too long")
            return
        if self.proven.is_set():
            self._push(pack_item([Call.PING]))
        self._ping_later()

"""The caller's side of the token links: one persistent connection per replica, many streams on it.

Owns the connections and the streams' slots. Does not choose replicas and does not retry: a broken
link raises `ConnectionFailedError` at once and the caller asks the router again. Invariant: a
stream that its consumer left is cancelled at the replica, whatever made the consumer leave.
"""

import asyncio
from collections.abc import AsyncGenerator
from functools import partial

from serve_app.adapters.metrics import links_changed
from serve_app.adapters.tcp_link_peers import (
    FRAME_HEAD_BYTES,
    CallingLink,
    LinkContext,
    Links,
)
from serve_app.adapters.tcp_link_wire import (
    Answer,
    Call,
    DeltaSlot,
    Item,
    LinkSettings,
    WireError,
    call_start,
    pack_item,
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

PEER = "replica"


class TcpTokenLink:
    """Streams answers from replicas; one per process and event loop."""

    def __init__(
        self, secret: bytes, clock: Clock, entropy: Entropy, settings: LinkSettings | None = None
    ) -> None:
        context = LinkContext(secret, clock, entropy, settings or LinkSettings())
        self._links = Links(partial(_ClientConnection, context), PEER, context, links_changed)

    async def generate(self, grant: Grant, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        """Stream the answer; see `ports.TokenLink`.

        Raises:
            InvalidPromptError: the request does not fit into a frame.
        """
        connection = await self._links.get((grant.host, grant.port))
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
        await self._links.close()


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


class _ClientConnection(CallingLink):
    def __init__(self, context: LinkContext) -> None:
        super().__init__(context, PEER)
        self._streams: dict[int, _ClientStream] = {}
        self._stream_count = 0

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
        self.push(packed)
        return stream

    def leave(self, stream: _ClientStream) -> None:
        """The consumer is done; a stream that has not ended is cancelled at the replica."""
        if self._streams.pop(stream.stream_id, None) is not None and not self.is_closed:
            self.push(pack_item([Call.CANCEL, stream.stream_id]))

    def closed(self) -> None:
        super().closed()
        streams, self._streams = tuple(self._streams.values()), {}
        for stream in streams:
            stream.fail(ConnectionFailedError(f"the link to the replica broke: {self.reason}"))

    def handle(self, item: Item) -> None:
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

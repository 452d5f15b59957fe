"""The replica's side of the token links: spends grants, feeds the engine, sends what it emits.

Owns the listening socket and, per connection, the streams that run for it. Does not generate and
does not choose: the engine and the router do. Invariant: a stream lives exactly as long as its
connection or its generation, whichever ends first; a connection that is gone has had every one of
its generations aborted.
"""

import logging
from dataclasses import replace

from serve_app.adapters.tcp_link_peers import AcceptedLink, LinkContext, LinkServer
from serve_app.adapters.tcp_link_wire import (
    Answer,
    Call,
    DeltaSlot,
    Item,
    LinkSettings,
    WireError,
    answer_chunk,
    answer_error,
    pack_frame,
    read_start,
)
from serve_app.core.errors import ConnectionFailedError, OverloadedError, ServeAppError
from serve_app.core.grants import GrantLedger
from serve_app.core.inference import Chunk, GenerationRequest, Grant, ReplicaLoad
from serve_app.ports import Clock, Entropy, InferenceEngine

ITEM_BYTES_MAX = 128  # an upper bound of what an item adds to its text and token ids

logger = logging.getLogger(__name__)


class TokenLinkServer(LinkServer["_ServerConnection"]):
    """Serves one engine to any number of clients that know the cluster secret."""

    def __init__(
        self,
        engine: InferenceEngine,
        secret: bytes,
        replica_id: str,
        clock: Clock,
        entropy: Entropy,
        settings: LinkSettings | None = None,
    ) -> None:
        self.settings = settings or LinkSettings()
        super().__init__(LinkContext(secret, clock, entropy, self.settings))
        self.engine = engine
        self.clock = clock
        self.is_draining = False
        self._replica_id = replica_id
        self._ledger = GrantLedger(secret, replica_id)

    @property
    def port(self) -> int:
        """Where it listens; 0 before `start`."""
        return self._port

    def accept(self) -> "_ServerConnection":
        """See `LinkServer`."""
        return _ServerConnection(self)

    def hand_over(self) -> int:
        """Give every stream up, after what it has said, so that its caller goes on elsewhere.

        From here on new requests are refused. Returns how many streams there were.
        """
        self.is_draining = True
        return sum(connection.hand_over() for connection in tuple(self.connections))

    @property
    def stream_count(self) -> int:
        """Open streams of all connections."""
        return sum(len(connection.streams) for connection in self.connections)

    def load(self) -> ReplicaLoad:
        """The engine's load, with this replica's name and where its link listens."""
        return replace(
            self.engine.load(), replica_id=self._replica_id, host=self._host, port=self._port
        )

    def spend(self, grant: Grant, request: GenerationRequest) -> None:
        """Accept the grant for this request, once.

        Raises:
            ServeAppError: what `GrantLedger.spend` says, or the grant is for another request.
        """
        if grant.request_id != request.request_id:
            raise ConnectionFailedError("the grant is for another request")
        self._ledger.spend(grant, self.clock.now_ms())


class _ServerStream:
    """One generation of one connection, between the engine's `emit` and the next frame."""

    __slots__ = ("connection", "request_id", "slot", "stream_id")

    def __init__(self, connection: "_ServerConnection", stream_id: int, request_id: str) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.request_id = request_id
        self.slot = DeltaSlot()

    def emit(self, output: Chunk | Exception) -> None:
        """Called by the engine, on the loop."""
        self.connection.emitted(self, output)


class _ServerConnection(AcceptedLink):
    def __init__(self, server: TokenLinkServer) -> None:
        super().__init__(server)
        self.streams: dict[int, _ServerStream] = {}
        self._server = server
        self._dirty: list[_ServerStream] = []  # streams with something in their slot, in order
        self._control: list[Item] = []  # errors and pongs; they follow the deltas of the turn
        self._pending_bytes = 0  # an upper bound of the next frame

    @property
    def is_busy(self) -> bool:
        return bool(self.streams)

    def closed(self) -> None:
        super().closed()
        streams, self.streams = tuple(self.streams.values()), {}
        self._dirty.clear()
        self._control.clear()
        for stream in streams:
            self._server.engine.abort(stream.request_id)
        if streams:
            extra = {"reason": self.reason, "aborted": len(streams)}
            logger.info("link closed with open streams", extra=extra)

    def emitted(self, stream: _ServerStream, output: Chunk | Exception) -> None:
        """Take what the engine has for a stream."""
        if stream.stream_id not in self.streams:
            return  # the connection is gone, and this is the answer to its abort
        if isinstance(output, Exception):
            del self.streams[stream.stream_id]
            self._answer_error(stream.stream_id, output)
            return
        if output.finish_reason is not None:
            del self.streams[stream.stream_id]
        if stream.slot.is_empty:
            self._dirty.append(stream)
            self._pending_bytes += ITEM_BYTES_MAX
        stream.slot.add(output)
        self._pending_bytes += 4 * len(output.text) + 5 * len(output.token_ids)
        self._flush_soon()

    def flush(self) -> None:
        if self.is_paused:
            return  # deltas merge in their slots meanwhile; resume_writing calls again
        dirty, self._dirty = self._dirty, []
        items: list[Item] = [answer_chunk(stream.stream_id, stream.slot.take()) for stream in dirty]
        items += self._control
        self._control = []
        self._pending_bytes = 0
        if items:
            self.send(pack_frame(items))

    def _flush_soon(self) -> None:
        if self._pending_bytes <= self.settings.pending_bytes_max:
            self.schedule_flush()
        elif self.is_paused:
            self.break_off("the client reads too slowly")
        else:
            self.flush()

    def handle(self, item: Item) -> None:
        match item:
            case [Call.START, *_]:
                self._start(item)
            case [Call.CANCEL, stream_id]:
                if (stream := self.streams.get(stream_id)) is not None:
                    self._server.engine.abort(stream.request_id)
            case [Call.PING]:
                self._answer([Answer.PONG])
            case _:
                raise WireError("an item of an unknown kind")

    def _start(self, item: Item) -> None:
        stream_id, grant, request = read_start(item)
        if stream_id in self.streams:
            raise WireError("a stream id is in use")
        try:
            self._check_room()
            self._server.spend(grant, request)
            stream = _ServerStream(self, stream_id, request.request_id)
            self.streams[stream_id] = stream
            self._server.engine.submit(request, stream.emit)
        except Exception as error:  # noqa: BLE001 - one request's failure must not break the others' link
            self.streams.pop(stream_id, None)
            self._answer_error(stream_id, error)

    def hand_over(self) -> int:
        """See `TokenLinkServer.hand_over`."""
        streams, self.streams = tuple(self.streams.values()), {}
        for stream in streams:
            self._answer_error(stream.stream_id, ConnectionFailedError("the replica is draining"))
            self._server.engine.abort(stream.request_id)
        return len(streams)

    def _check_room(self) -> None:
        if self._server.is_draining:
            raise ConnectionFailedError("the replica is draining")
        if len(self.streams) >= self.settings.streams_max:
            raise OverloadedError("too many streams on one link")

    def _answer_error(self, stream_id: int, error: Exception) -> None:
        if not isinstance(error, ServeAppError):
            logger.error("generation failed", exc_info=error)
            error = ServeAppError("the engine failed on this request")
        self._answer(answer_error(stream_id, error))

    def _answer(self, item: Item) -> None:
        self._control.append(item)
        message_length = len(item[-1]) if isinstance(item[-1], str) else 0
        self._pending_bytes += ITEM_BYTES_MAX + 4 * message_length
        self._flush_soon()

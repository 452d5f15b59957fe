"""What travels on a link: frames, items, the hello, errors, and the merging of deltas.

Owns the bytes; opens no socket and reads no clock. A frame is a 4-byte big-endian length and a
msgpack list of items; an item is a list that starts with its kind. Invariant: both sides speak the
same `VERSION`, which the hello checks, so a change of any layout below raises it.

The hello proves that both sides know the cluster secret (HMAC-SHA256 over both nonces and the
role, so that a proof can be neither replayed nor reflected). It does not encrypt: the link belongs
on a network that the operator trusts not to alter packets.
"""

import hashlib
import hmac
import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Any

import msgpack

from serve_app.core.errors import ServeAppError
from serve_app.core.inference import (
    Chunk,
    ChunkDetails,
    FinishReason,
    GenerationRequest,
    Grant,
    Message,
    TokenScore,
    Usage,
)

VERSION = 3
HELLO_BYTES_MAX = 256  # what a peer can make us hold before it has proved itself
LENGTH = struct.Struct(">I")

Item = list[Any]


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """The bounds of a link; the same on both sides unless said otherwise.

    Args:
        frame_bytes_max: one frame, in either direction; also bounds one request.
        pending_bytes_max: server: undelivered deltas of one connection, at most
            `frame_bytes_max`; a reader that falls further behind is cut off.
        write_buffer_bytes: what the transport may hold before deltas are merged instead.
        hello_timeout_s: from accepting a connection to the last message of the hello.
        connect_timeout_s: client: reaching the replica, hello included.
        ping_interval_s: how often a client with open streams shows that it lives.
        silence_max_s: a peer with open streams that was silent longer counts as broken. Pongs come
            from the replica's event loop, not its engine, so a long prefill is no silence.
        streams_max: server: open streams of one connection.
        strangers_max: server: connections that have not proved themselves yet.
    """

    frame_bytes_max: int = 8 * 2**20
    pending_bytes_max: int = 4 * 2**20
    write_buffer_bytes: int = 256 * 2**10
    hello_timeout_s: float = 5.0
    connect_timeout_s: float = 5.0
    ping_interval_s: float = 5.0
    silence_max_s: float = 15.0
    streams_max: int = 4096
    strangers_max: int = 64


class WireError(Exception):
    """The peer does not keep to the protocol; the connection must be closed."""


class Call(IntEnum):
    """Kinds of items from client to server."""

    START = 0  # stream id, grant, request
    CANCEL = 1  # stream id
    PING = 2
    ADMIT = 3  # number, what the router needs to know; to a router, as CANCEL with the number


class Answer(IntEnum):
    """Kinds of items from server to client."""

    DELTA = 0  # stream id, text, token ids, and the details where there are some
    END = 1  # stream id, text, token ids, finish reason, usage, likewise
    ERROR = 2  # stream id, code, message
    PONG = 3
    GRANT = 4  # number, the grant's members; ERROR likewise answers a number


class FrameReader:
    """Cuts a byte stream into frames; `bytes_max` may be raised once the peer is known."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """Yield the list of each frame that is complete now.

        Raises:
            WireError: a frame over the bound (before it is held) or one that is no list.
        """
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer)
            if size > self.bytes_max:
                raise WireError(f"a frame of {size} bytes is over the bound of {self.bytes_max}")
            end = LENGTH.size + size
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[LENGTH.size : end])
            del self._buffer[:end]
            yield unpack_list(body)


def unpack_list(body: bytes) -> list[Any]:
    """The list that a frame holds.

    Raises:
        WireError: it holds something else.
    """
    try:
        value = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"a frame is no msgpack: {type(error).__name__}") from error
    if not isinstance(value, list):
        raise WireError("a frame holds no list")
    return value


def pack_frame(items: list[Any]) -> bytes:
    """One frame of these items."""
    body: bytes = msgpack.packb(items)
    return LENGTH.pack(len(body)) + body


def pack_item(item: Item) -> bytes:
    """One item alone, for `join_frame`.

    Raises:
        ValueError: it cannot be packed (a lone surrogate, a number over 64 bits).
    """
    try:
        packed: bytes = msgpack.packb(item)
    except (OverflowError, TypeError) as error:
        raise ValueError(str(error)) from error
    return packed


def join_frame(packed: list[bytes]) -> bytes:
    """One frame of items that are packed already."""
    head = msgpack.Packer().pack_array_header(len(packed))
    body = b"".join([head, *packed])
    return LENGTH.pack(len(body)) + body


def proof(secret: bytes, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What shows that `role` knows the secret; both nonces are fixed to 32 bytes by hashing."""
    nonces = hashlib.sha256(server_nonce).digest() + hashlib.sha256(client_nonce).digest()
    message = b"inferpipe-link-%d %s " % (VERSION, role)
    return hmac.new(secret, message + nonces, hashlib.sha256).digest()


def call_start(stream_id: int, grant: Grant, request: GenerationRequest) -> Item:
    """The item that starts a generation."""
    messages = [[message.role, message.content] for message in request.messages]
    settings = [
        request.model,
        request.max_tokens,
        request.temperature,
        request.top_p,
        request.stop,
        request.seed,
        request.output_schema,
        request.deadline_ms,
        request.priority,
        request.prompt_token_ids,
        request.engine_options,
        request.tenant,
        request.session,
        request.resume_ids,
    ]
    return [Call.START, stream_id, astuple(grant), request.request_id, messages, settings]


def read_start(item: Item) -> tuple[int, Grant, GenerationRequest]:
    """Stream id, grant and request of a start item.

    Raises:
        WireError: it has another layout.
    """
    try:
        _, stream_id, grant, request_id, messages, settings = item
        model, max_tokens, temperature, top_p, stop, seed, schema, *rest = settings
        deadline_ms, priority, prompt_token_ids, engine_options, *rest = rest
        tenant, session, resume_ids = rest
        request = GenerationRequest(
            request_id=request_id,
            messages=tuple(Message(*message) for message in messages),
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=tuple(stop),
            seed=seed,
            output_schema=schema,
            deadline_ms=deadline_ms,
            priority=priority,
            prompt_token_ids=tuple(prompt_token_ids),
            engine_options=engine_options,
            tenant=tenant,
            session=session,
            resume_ids=tuple(resume_ids),
        )
        return stream_id, Grant(*grant), request
    except (TypeError, ValueError) as error:
        raise WireError("a start item has another layout") from error


def answer_error(stream_id: int, error: ServeAppError) -> Item:
    """The item that ends a stream with an error: its code and words, never a pickle."""
    return [Answer.ERROR, stream_id, error.code.value, str(error)]


def read_error(code: str, message: str) -> ServeAppError:
    """The error of this code; an unknown code (a newer peer's) becomes the root error."""
    return ERROR_TYPES.get(code, ServeAppError)(message)


def answer_chunk(stream_id: int, chunk: Chunk) -> Item:
    """The item that carries a chunk."""
    item: Item = [Answer.DELTA, stream_id, chunk.text, chunk.token_ids]
    if chunk.finish_reason is not None:
        usage = chunk.usage or Usage()
        counts = [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens]
        item = [Answer.END, *item[1:], chunk.finish_reason.value, counts]
    if (details := chunk.details) is not None:
        extra = [details.embedding] if details.embedding else []
        item.append([details.logprobs, details.prompt_logprobs, details.stop_reason, *extra])
    return item


class DeltaSlot:
    """What has arrived of one stream and was not taken yet; its size is bounded by the answer.

    A lone chunk, the common case, passes through untouched; only further ones cost lists.
    """

    __slots__ = ("_details", "_first", "_parts", "_tail", "_token_ids")

    def __init__(self) -> None:
        self._first: Chunk | None = None
        self._tail: Chunk | None = None  # the newest merged chunk: its end and usage count
        self._details: ChunkDetails | None = None  # of the merged chunks, the first one's included
        self._parts: list[str] = []
        self._token_ids: list[int] = []

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return self._first is None

    def add(self, chunk: Chunk) -> None:
        """Merge a chunk behind what is there."""
        if self._first is None:
            self._first = chunk
            return
        if self._tail is None:
            self._details = self._first.details
        if chunk.details is not None:
            known = self._details
            self._details = chunk.details if known is None else known + chunk.details
        self._tail = chunk
        self._parts.append(chunk.text)
        self._token_ids.extend(chunk.token_ids)

    def take(self) -> Chunk:
        """Everything since the last time as one chunk; not to be called on an empty slot."""
        first, tail = self._first, self._tail
        assert first is not None
        self._first = None
        if tail is None:
            return first
        merged = Chunk(
            first.text + "".join(self._parts),
            first.token_ids + tuple(self._token_ids),
            tail.finish_reason,
            tail.usage,
            self._details,
        )
        self._tail = None
        self._details = None
        self._parts.clear()
        self._token_ids.clear()
        return merged


def read_chunk(item: Item) -> Chunk:
    """The chunk of a delta or end item.

    Raises:
        WireError: it has another layout.
    """
    try:
        if item[0] == Answer.DELTA:
            _, _, text, token_ids, *details = item
            if not details:
                return Chunk(text, tuple(token_ids))
            return Chunk(text, tuple(token_ids), details=_read_details(*details))
        _, _, text, token_ids, finish_reason, counts, *details = item
        return Chunk(
            text,
            tuple(token_ids),
            FinishReason(finish_reason),
            Usage(*counts),
            _read_details(*details) if details else None,
        )
    except (TypeError, ValueError, IndexError) as error:
        raise WireError("an answer item has another layout") from error


def _read_details(item: Item) -> ChunkDetails:
    logprobs, prompt_logprobs, stop_reason, *embedding = item
    scores = _read_scores(logprobs), _read_scores(prompt_logprobs)
    return ChunkDetails(*scores, stop_reason, *map(bytes, embedding))


def _read_scores(places: list[list[Item]]) -> tuple[tuple[TokenScore, ...], ...]:
    return tuple(
        tuple((int(id_), float(logprob), rank, text) for id_, logprob, rank, text in scores)
        for scores in places
    )


def _error_types() -> dict[str, type[ServeAppError]]:
    found: dict[str, type[ServeAppError]] = {}
    waiting: list[type[ServeAppError]] = [ServeAppError]
    while waiting:
        error_type = waiting.pop()
        if error_type.__module__ == ServeAppError.__module__:  # others take other arguments
            found[error_type.code.value] = error_type
        waiting.extend(error_type.__subclasses__())
    return found


ERROR_TYPES = _error_types()  # by code; every class takes its message as the only needed argument

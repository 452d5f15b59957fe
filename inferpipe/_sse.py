"""Server-sent events as bytes: one function writes them, one class reads them.

Owns the framing of the WHATWG HTML standard, section 9.2 "Server-sent events", and nothing of
what events mean. Invariant: the decoder's output depends on the bytes alone, never on how the
network cut them into chunks.
"""

import re
from dataclasses import dataclass

EVENT_BYTES_MAX = 32 * 1024 * 1024  # a terminal event holds a whole result; bodies end at 10 MiB

_LINE_END = re.compile(rb"\r\n|\n|\r")
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One dispatched event.

    `id` is the `id:` line of this very event, None when it had none; what the standard calls the
    last event id, which outlives an event, is `SseDecoder.last_event_id`.
    """

    event: str
    data: str
    id: str | None = None


class SseTooLargeError(ValueError):
    """One event exceeds the decoder's bound; the decoder cannot be used any more."""


def encode_sse(event: str, data: bytes, event_id: int | None) -> bytes:
    """Frame one event.

    Line breaks inside `data` become several `data:` lines, as the standard has it; a reader gets
    them all back as LF. `data` must be UTF-8.

    Raises:
        ValueError: `event` holds a line break, which would forge further fields.
    """
    if "\n" in event or "\r" in event:
        raise ValueError("an SSE event name cannot hold a line break")
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(_LINE_END.split(data))
    head = b"" if event_id is None else b"id: %d\n" % event_id
    return b"%bevent: %b\ndata: %b\n\n" % (head, event.encode(), data)


class SseDecoder:
    """Turns the bytes of one connection into events; make a new one for each connection.

    Lines are split on bytes and decoded whole, so a code point cut in two by the network is never
    seen half: neither CR nor LF occurs inside a UTF-8 sequence. An event that the connection's end
    cuts off is dropped, as the standard demands.
    """

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self._event_bytes_max = event_bytes_max
        self._line = bytearray()  # a line whose end has not come yet
        self._after_cr = False
        self._at_start = True
        self._id_buffer = ""
        self._event = ""
        self._own_id: str | None = None
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes; return the events that they complete, in order.

        Raises:
            SseTooLargeError: one event is larger than the bound.
        """
        if not chunk:
            return []
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *ends, rest = _LINE_END.split(chunk)
        events: list[ServerSentEvent] = []
        for end in ends:
            self._hold(end)
            line = bytes(self._line)
            self._line.clear()
            event = self._take_line(line)
            if event is not None:
                events.append(event)
        self._hold(rest)
        return events

    def _hold(self, part: bytes) -> None:
        if self._data_bytes + len(self._line) + len(part) > self._event_bytes_max:
            raise SseTooLargeError(f"one event exceeds {self._event_bytes_max} bytes")
        self._line += part

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_UTF8_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        self._take_field(name, value.removeprefix(b" "))
        return None

    def _take_field(self, name: bytes, value: bytes) -> None:
        # A comment's name is empty, so it falls through with the unknown fields.
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self._id_buffer = self._own_id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            self.retry_ms = int(value[:9])  # nine digits are eleven days: more says nothing

    def _dispatch(self) -> ServerSentEvent | None:
        self.last_event_id = self._id_buffer
        event = None
        if self._data:
            data = b"\n".join(self._data).decode("utf-8", "replace")
            event = ServerSentEvent(self._event or "message", data, self._own_id)
        self._event, self._own_id, self._data, self._data_bytes = "", None, [], 0
        return event

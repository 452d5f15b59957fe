"""The SSE framing, against the rules of the WHATWG HTML standard, section 9.2."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferpipe.wire import ServerSentEvent, SseDecoder, SseTooLargeError, encode_sse


def decode(*chunks: bytes) -> list[ServerSentEvent]:
    decoder = SseDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def event(data: str, name: str = "message", event_id: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(name, data, event_id)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # The standard's own examples.
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [event("YHOO\n+2\n10")]),
        (
            b": test stream\n\ndata: first\nid: 1\n\ndata:second event\nid\n\ndata:  third\n\n",
            [
                event("first", event_id="1"),
                event("second event", event_id=""),
                event(" third"),
            ],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [event(""), event("\n")]),
        (b"data:test\n\ndata: test\n\n", [event("test"), event("test")]),
        # Line ends, alone and mixed.
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [event("a"), event("b"), event("c")]),
        (b"data: a\r\ndata: b\r\n\r\n", [event("a\nb")]),
        (b"data: a\rdata: b\ndata: c\r\n\n", [event("a\nb\nc")]),
        # A byte order mark counts at the start only.
        (b"\xef\xbb\xbfdata: a\n\n", [event("a")]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [event("a")]),
        # Fields.
        (b"event: chunk\ndata: x\n\ndata: y\n\n", [event("x", "chunk"), event("y")]),
        (b"event: chunk\n\ndata: y\n\n", [event("y")]),
        (b"id: 1\0\ndata: x\n\n", [event("x")]),
        (b"unknown: 1\nDATA: no\ndata : no\n: note\ndata: x\n\n", [event("x")]),
        (b'data: {"a": "b:c"}\n\n', [event('{"a": "b:c"}')]),
        # An unfinished event is dropped; bad UTF-8 is replaced.
        (b"data: a\n\ndata: b\n", [event("a")]),
        (b"data: \xff\xe2\x82\n\n", [event("\ufffd\ufffd")]),
        (b"", []),
    ],
)
def test_decoder_follows_the_standard(stream: bytes, expected: list[ServerSentEvent]) -> None:
    assert decode(stream) == expected
    assert decode(*(bytes([byte]) for byte in stream)) == expected


FRAGMENTS = st.sampled_from(
    [
        *(b"data: ", b"data", b"id: 7", b"id", b"event: chunk", b"retry: 9", b": note", b" ", b":"),
        *(b"\r", b"\n", b"\r\n", b"\n\n", b"\r\r", b"\0", b"\xef\xbb\xbf", b"\xe2\x82", b"\xff"),
        "€😀".encode(),
    ]
)


@given(st.lists(FRAGMENTS | st.binary(max_size=4)).map(b"".join), st.data())
def test_decoder_output_does_not_depend_on_chunking(stream: bytes, data: st.DataObject) -> None:
    whole, pieces = SseDecoder(), SseDecoder()
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    edges = [0, *cuts, len(stream)]
    arrived = []
    for start, end in pairwise(edges):
        arrived += pieces.feed(stream[start:end])
    assert arrived == whole.feed(stream)
    assert (pieces.last_event_id, pieces.retry_ms) == (whole.last_event_id, whole.retry_ms)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1)
TEXTS = st.text(st.characters(codec="utf-8"))


@given(st.lists(st.tuples(NAMES, TEXTS, st.none() | st.integers(0, 2**63))))
def test_what_is_encoded_is_decoded(events: list[tuple[str, str, int | None]]) -> None:
    stream = b"".join(encode_sse(name, text.encode(), seq) for name, text, seq in events)
    expected = [
        event(
            text.replace("\r\n", "\n").replace("\r", "\n"),
            name,
            None if seq is None else str(seq),
        )
        for name, text, seq in events
    ]
    assert decode(stream) == expected


def test_encode_sse_writes_these_bytes() -> None:
    assert encode_sse("chunk", b'{"data":"a"}', 5) == b'id: 5\nevent: chunk\ndata: {"data":"a"}\n\n'
    assert encode_sse("connected", b"{}", None) == b"event: connected\ndata: {}\n\n"
    assert encode_sse("x", b"a\r\nb", 0) == b"id: 0\nevent: x\ndata: a\ndata: b\n\n"


@pytest.mark.parametrize("name", ["a\nid: 9", "a\rb"])
def test_encode_sse_refuses_a_forged_field(name: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        encode_sse(name, b"", None)


def test_decoder_keeps_the_last_event_id_and_retry() -> None:
    decoder = SseDecoder()
    decoder.feed(b"id: 4\nretry: 250\ndata: x\n\n")
    assert decoder.feed(b"retry: soon\ndata: y\n\n") == [event("y")]
    assert (decoder.last_event_id, decoder.retry_ms) == ("4", 250)


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("shape", ["one line", "many lines"])
def test_decoder_bounds_one_event(shape: str, piece: int) -> None:
    def feed(size: int) -> int:
        decoder = SseDecoder(event_bytes_max=40)
        line = b"data: " + b"x" * (size - 6)
        stream = line if shape == "one line" else b"data: " + b"x" * 10 + b"\n" + line[:-11]
        return sum(
            len(decoder.feed((stream + b"\n\n")[start : start + piece]))
            for start in range(0, len(stream) + 2, piece)
        )

    assert feed(39) == 1
    assert feed(40) == 1
    with pytest.raises(SseTooLargeError, match="exceeds 40 bytes"):
        feed(41)


def test_decoder_bound_is_per_event_and_ignores_comments() -> None:
    decoder = SseDecoder(event_bytes_max=40)
    for _ in range(100):
        assert decoder.feed(b": keep-alive\n\ndata: 0123456789\n\n") == [event("0123456789")]

"""The bytes of a token link: frames cut anywhere, merging, errors by code, the hello's proof."""

from itertools import pairwise

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.adapters.tcp_link_wire import (
    DeltaSlot,
    FrameReader,
    WireError,
    answer_chunk,
    answer_error,
    call_start,
    join_frame,
    pack_frame,
    pack_item,
    proof,
    read_chunk,
    read_error,
    read_start,
)
from serve_app.core.errors import ErrorCode, InvalidRequestError, ServeAppError, StepFailedError
from serve_app.core.inference import (
    Chunk,
    ChunkDetails,
    FinishReason,
    GenerationRequest,
    Grant,
    Message,
    Usage,
)

GRANT = Grant("r1", "replica-1", "127.0.0.1", 4000, 99, "ab")
FULL = GenerationRequest(
    request_id="r1",
    messages=(Message("system", "be brief"), Message("user", "hé")),
    model="m",
    max_tokens=5,
    temperature=0.5,
    top_p=0.9,
    stop=("a", "b"),
    seed=2**63,
    output_schema={"type": "object", "properties": {"a": {"enum": [1, None]}}},
    deadline_ms=123,
    priority=-1,
)
TOKENS = GenerationRequest(
    request_id="r3",
    messages=(),
    prompt_token_ids=(0, 5, 2**31),
    engine_options={"logprobs": 2, "logit_bias": {"7": -1.5}, "stop_token_ids": [3]},
)
scores = st.tuples(
    st.integers(0, 2**32 - 1), st.floats(max_value=0), st.none() | st.integers(1, 9), st.text()
)
places = st.lists(st.lists(scores, max_size=2).map(tuple), max_size=2).map(tuple)
details = st.builds(ChunkDetails, logprobs=places, prompt_logprobs=places)
chunks = st.builds(
    Chunk,
    text=st.text(max_size=5),
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
    details=st.none() | details,
)


@given(
    st.lists(
        st.lists(st.integers(), max_size=4).filter(lambda items: all(abs(i) < 2**63 for i in items))
    ),
    st.lists(st.integers(0, 400), max_size=10),
)
def test_frames_survive_any_cut(frames: list[list[int]], cuts: list[int]) -> None:
    stream = b"".join(pack_frame(items) for items in frames)
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = FrameReader(bytes_max=1000)
    read = [items for left, right in pairwise(borders) for items in reader.feed(stream[left:right])]
    assert read == frames


def test_joined_items_are_the_frame_of_these_items() -> None:
    items = [[0, "a"], [2], [1, 7]]
    assert join_frame([pack_item(item) for item in items]) == pack_frame(items)


@pytest.mark.parametrize(("size", "is_read"), [(99, True), (100, True), (101, False)])
def test_frame_bound_holds_before_the_body_is_there(*, size: int, is_read: bool) -> None:
    reader = FrameReader(bytes_max=100)
    head = size.to_bytes(4, "big")
    if is_read:
        assert list(reader.feed(head)) == []
    else:
        with pytest.raises(WireError, match="over the bound"):
            list(reader.feed(head))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x05", b"\x80", b"\x91" * 2000, b"\x90\x90"])
def test_frame_that_holds_no_list_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        list(FrameReader(9999).feed(len(body).to_bytes(4, "big") + body))


@pytest.mark.parametrize(
    "request_", [FULL, GenerationRequest("r2", (Message("user", "x"),)), TOKENS]
)
def test_start_comes_back_as_it_went(request_: GenerationRequest) -> None:
    item = msgpack.unpackb(pack_item(call_start(7, GRANT, request_)))
    assert read_start(item) == (7, GRANT, request_)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff"])
def test_text_that_is_no_unicode_cannot_be_packed(text: str) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        pack_item(call_start(1, GRANT, GenerationRequest("r", (Message("user", text),))))


def test_number_over_64_bits_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r".+"):
        pack_item(call_start(1, GRANT, GenerationRequest("r", (), seed=2**70)))


@pytest.mark.parametrize(
    "item", [[0], [0, 1, [], "r", [], []], [0, 1, ["x"], "r", [[1]], [None] * 9]]
)
def test_start_of_another_layout_is_refused(item: list[object]) -> None:
    with pytest.raises(WireError):
        read_start(item)


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk("a", (1,)),
        Chunk("", ()),
        Chunk("z", (4, 5), FinishReason.STOP, Usage(3, 2, 1)),
        Chunk("", (), FinishReason.CANCELLED, Usage()),
        Chunk("a", (1,), details=ChunkDetails((((1, -0.5, 1, "a"), (2, -1.0, 2, None)),))),
        Chunk("", (), FinishReason.STOP, Usage(), ChunkDetails((), ((), ((1, 0.0, 1, "x"),)), "z")),
        Chunk("", (), FinishReason.STOP, Usage(), ChunkDetails(embedding=b"\x00\x00\x80\xff")),
    ],
)
def test_chunk_comes_back_as_it_went(chunk: Chunk) -> None:
    assert read_chunk(msgpack.unpackb(pack_item(answer_chunk(3, chunk)))) == chunk


@pytest.mark.parametrize(
    "item",
    [[0], [0, 1, "a"], [1, 1, "a", []], [1, 1, "a", [], "odd", [0, 0, 0]], [0, 1, "a", [], [1]]],
)
def test_answer_of_another_layout_is_refused(item: list[object]) -> None:
    with pytest.raises(WireError):
        read_chunk(item)


@given(st.lists(chunks, min_size=1, max_size=8), st.booleans())
def test_merging_loses_and_reorders_nothing(parts: list[Chunk], has_end: bool) -> None:
    if has_end:
        parts = [*parts, Chunk("!", (9,), FinishReason.LENGTH, Usage(1, 2))]
    slot = DeltaSlot()
    for part in parts:
        slot.add(part)
    merged = slot.take()
    assert merged.text == "".join(part.text for part in parts)
    assert merged.token_ids == tuple(token for part in parts for token in part.token_ids)
    assert (merged.finish_reason, merged.usage) == (parts[-1].finish_reason, parts[-1].usage)
    told = [part.details for part in parts if part.details is not None]
    assert (merged.details is None) == (not told)
    if merged.details is not None:
        assert merged.details.logprobs == tuple(at for one in told for at in one.logprobs)
        assert merged.details.prompt_logprobs == tuple(
            at for one in told for at in one.prompt_logprobs
        )
    assert slot.is_empty


def test_slot_is_clean_after_taking() -> None:
    slot = DeltaSlot()
    slot.add(Chunk("a", (1,)))
    slot.add(Chunk("b", (2,)))
    slot.take()
    slot.add(Chunk("c", (3,)))
    slot.add(Chunk("d", (4,)))
    assert slot.take() == Chunk("cd", (3, 4))


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_comes_back_as_an_error(code: ErrorCode) -> None:
    error = read_error(code.value, "why")
    assert str(error) == "why"
    assert error.code in {code, ErrorCode.INTERNAL}


@pytest.mark.parametrize(
    "error", [InvalidRequestError("bad"), StepFailedError("no"), ServeAppError("x")]
)
def test_error_comes_back_with_its_type_and_words(error: ServeAppError) -> None:
    _, _, code, message = answer_error(1, error)
    rebuilt = read_error(code, message)
    assert (type(rebuilt), str(rebuilt)) == (type(error), str(error))


def test_code_of_a_newer_peer_is_an_internal_error() -> None:
    assert type(read_error("SOMETHING_NEW", "x")) is ServeAppError


def test_proof_depends_on_secret_role_and_both_nonces() -> None:
    cases = [
        (b"s", b"client", b"n1", b"n2"),
        (b"t", b"client", b"n1", b"n2"),
        (b"s", b"server", b"n1", b"n2"),
        (b"s", b"client", b"n2", b"n1"),
        (b"s", b"client", b"n1n", b"2"),
    ]
    assert len({proof(*case) for case in cases}) == len(cases)

"""What is kept apart of a record, and that nobody who reads it can tell."""

import pytest

from serve_app.adapters.event_codec import decode_event, encode_event
from serve_app.adapters.payloads import Splitter, joined, references, size_of
from serve_app.core.execution import ExecutionCompleted, ExecutionCreated, StepCompleted

INLINE = 1024


def text_of(size: int) -> str:
    return "x" * (size - 2)  # two quotes make it the size, as JSON


@pytest.mark.parametrize(("size", "is_apart"), [(INLINE - 1, False), (INLINE + 1, True)])
def test_a_record_is_split_above_the_bound(size: int, is_apart: bool) -> None:
    splitter = Splitter(INLINE)
    frame = len(b'{"value":}')
    data = splitter.encode({"value": text_of(size - frame)})
    assert bool(splitter.payloads) is is_apart
    assert bool(references([data])) is is_apart
    assert joined(data, splitter.payloads) == {"value": text_of(size - frame)}


def test_an_event_comes_back_as_it_was() -> None:
    large = {"text": "é" * 5000, "_refs": {"input": "not a name"}}
    event = ExecutionCreated(1, "ws", "wf", 2, large, metadata={"a": 1}, kept={"s": [large]})
    splitter = Splitter(INLINE)
    kind, data = encode_event(event, splitter)
    assert len(data) < INLINE
    assert set(references([data])) == set(splitter.payloads)
    assert decode_event(kind, data, splitter.payloads) == event
    assert all(size_of(name) == len(payload) for name, payload in splitter.payloads.items())


def test_a_text_that_looks_like_a_reference_is_a_text() -> None:
    event = StepCompleted(1, "s", {"_refs": {"output": "0.1"}, "quoted": '"_refs":'})
    kind, data = encode_event(event, Splitter(INLINE))
    assert references([data, data.decode()]) == []
    assert decode_event(kind, data) == event


def test_equal_results_are_kept_once() -> None:
    splitter = Splitter(INLINE)
    value = {"text": "x" * 5000}
    encode_event(StepCompleted(1, "s", value), splitter)
    encode_event(ExecutionCompleted(1, value), splitter)
    assert len(splitter.payloads) == 1


def test_a_list_leaves_payloads_out_but_never_metadata() -> None:
    created = ExecutionCreated(1, "ws", "wf", 2, "x" * 5000, metadata={"a": "y" * 5000})
    kind, data = encode_event(created, Splitter(INLINE))
    outline = decode_event(kind, data, None)
    assert isinstance(outline, ExecutionCreated)
    assert (outline.input, outline.metadata) == (None, {"a": "y" * 5000})


def test_a_payload_that_is_not_there_is_an_error_not_a_null() -> None:
    kind, data = encode_event(StepCompleted(1, "s", "x" * 5000), Splitter(INLINE))
    with pytest.raises(KeyError):
        decode_event(kind, data)

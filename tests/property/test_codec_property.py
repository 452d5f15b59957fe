"""Whatever value an event has, the journal gives it back."""

from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from serve_app.adapters.event_codec import decode_event, decode_stored, encode_event
from serve_app.core.execution import KINDS, Event, ExecutionCreated, Wait, WaitKind
from serve_app.core.gates import Gate, TokenShare, Verdict
from serve_app.core.inference import Resumed, Usage
from serve_app.core.journal import StoredEvent
from serve_app.core.origin import Origin, Refusal
from serve_app.core.retry import Backoff, RetryPolicy

INT_MAX = 2**63 - 1  # what JSON bodies and CEL give at most

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.integers(0, 10**12)
times = st.integers(0, 2**53)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-INT_MAX, INT_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
policies = st.builds(
    RetryPolicy,
    attempts=counts,
    backoff=st.sampled_from(Backoff),
    max_delay_ms=counts,
    initial_delay_ms=counts,
)
gates = st.builds(Gate, name=texts, limit=counts, waiting_max=counts, ttl_ms=st.none() | counts)
origins = st.builds(Origin, texts, texts, texts, times, json_values)
MEMBERS: dict[str, st.SearchStrategy[object]] = {
    "at_ms": times,
    "wake_at_ms": times,
    "attempt": counts,
    "execution_attempt": counts,
    "workflow_version": counts,
    "priority": st.integers(-100, 100),
    "timeout_ms": st.none() | counts,
    "user_id": st.none() | texts,
    "retry_of": st.none() | texts,
    "request_hash": st.none() | texts,
    "metadata": st.dictionaries(texts, json_values, max_size=3),
    "input": json_values,
    "output": json_values,
    "data": json_values,
    "retry": policies,
    "usage": st.builds(Usage, counts, counts, counts),
    "seq": counts,
    "progress": st.floats(0, 100),
    "wait": st.builds(Wait, st.sampled_from(WaitKind), times, st.none() | texts, st.none() | texts),
    "items": st.lists(json_values, max_size=4).map(tuple),
    "gates": st.lists(gates, max_size=2).map(tuple),
    "resumed": st.none() | st.sampled_from(Resumed),
    "verdict": st.sampled_from(Verdict),
    "trigger": st.none() | origins,
    "refusal": st.none() | st.builds(Refusal, texts, texts),
    "cancel_on": st.lists(texts, max_size=2).map(tuple),
    "hops": counts,
    "tokens": st.none() | st.builds(TokenShare, texts, counts, counts, counts, times),
    "value": json_values,
    "token_ids": st.lists(counts, max_size=5).map(tuple),
}


def events_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    names = [member.name for member in fields(kind)]
    return st.builds(kind, **{name: MEMBERS.get(name, texts) for name in names})


@given(st.sampled_from(list(KINDS.values())).flatmap(events_of), counts, texts)
def test_every_event_survives_the_journal(event: Event, seq: int, commit_id: str) -> None:
    kind, data = encode_event(event)
    assert KINDS[kind] is type(event)
    assert decode_event(kind, data) == event
    assert decode_stored(seq, kind, data, commit_id) == StoredEvent(seq, commit_id, event)


@given(events_of(ExecutionCreated))
def test_a_created_event_keeps_its_types(event: ExecutionCreated) -> None:
    again = decode_event(*encode_event(event))
    assert isinstance(again, ExecutionCreated)
    assert isinstance(again.retry.backoff, Backoff)
    assert repr(again.input) == repr(event.input)

"""Events and snapshots as JSON, the form they have in the store.

Owns the mapping between core's dataclasses and stored bytes; `payloads` splits what is large.
Invariant: what any release wrote, this one reads (`tests/replay`): members may be added with a
default, never renamed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

import orjson

from serve_app.adapters.payloads import NO_PAYLOADS, Splitter, joined
from serve_app.core.execution import (
    KIND_OF,
    KINDS,
    STEP_EVENTS,
    Event,
    Execution,
    ExecutionCreated,
    Signal,
    Status,
    StepState,
    StepStatus,
    Wait,
    WaitKind,
    new_execution,
)
from serve_app.core.gates import Gate, TokenShare, Verdict
from serve_app.core.inference import Resumed, Usage
from serve_app.core.journal import StoredEvent
from serve_app.core.origin import Origin, Refusal
from serve_app.core.retry import Backoff, RetryPolicy

_STEP_FIELD = "st:"
_TUPLES = frozenset({"token_ids", "items"})  # members that JSON has as lists
# Members of the snapshot's `x` field: all that is neither kept apart nor derived.
_EXECUTION_MEMBERS = tuple(
    member.name
    for member in fields(Execution)
    if member.name not in {"id", "seq", "status", "created", "steps", "live", "failed"}
)
_members_of = attrgetter(*_EXECUTION_MEMBERS)


def encode_event(event: Event, splitter: Splitter | None = None) -> tuple[str, bytes]:
    """The kind and the JSON of an event; without a splitter it is whole."""
    encode = orjson.dumps if splitter is None else splitter.encode
    return KIND_OF[type(event)], encode(event)


def decode_event(
    kind: str, data: bytes | str, payloads: Mapping[str, bytes] | None = NO_PAYLOADS
) -> Event:
    """The event; an unknown kind is a KeyError: the journal is of a later release.

    `payloads` holds what was kept apart, by name; with None large members are null, for a list.
    """
    members = joined(data, payloads)
    if "usage" in members:
        members["usage"] = Usage(**members["usage"])
    for name in _TUPLES & members.keys():
        members[name] = tuple(members[name] or ())
    if "wait" in members:
        members["wait"] = _wait(members["wait"])
    if members.get("resumed") is not None:
        members["resumed"] = Resumed(members["resumed"])
    if kind == "execution.created":
        members["retry"] = _retry(members["retry"])
        members["gates"] = tuple(Gate(**gate) for gate in members.get("gates", ()))
        _read_origin(members)
    if kind == "gate.answered":
        members["verdict"] = Verdict(members["verdict"])
    return KINDS[kind](**members)


def decode_stored(
    seq: int,
    kind: str,
    data: bytes | str,
    commit_id: str,
    payloads: Mapping[str, bytes] = NO_PAYLOADS,
) -> StoredEvent:
    """An entry of a journal."""
    return StoredEvent(seq, commit_id, decode_event(kind, data, payloads))


def changed_fields(
    before: Execution,
    after: Execution,
    events: Iterable[Event],
    splitter: Splitter | None = None,
) -> dict[str, bytes]:
    """The snapshot fields that the events changed; `seq` and `status` are the store's own.

    An event changes no step but its own, so that an execution with thousands costs no more.
    """
    encode = orjson.dumps if splitter is None else splitter.encode
    changed: dict[str, bytes] = {}
    members = _members_of(after)
    if members != _members_of(before):
        changed["x"] = encode(dict(zip(_EXECUTION_MEMBERS, members, strict=True)))
    for step_id in {event.step_id: None for event in events if isinstance(event, STEP_EVENTS)}:
        step = after.steps[step_id]
        if before.steps.get(step_id) is not step:
            changed[_STEP_FIELD + step_id] = encode(step)
    return changed


def decode_snapshot(
    execution_id: str,
    snapshot: Mapping[str, bytes],
    payloads: Mapping[str, bytes] | None = NO_PAYLOADS,
) -> Execution:
    """The state that a snapshot's fields hold; `payloads` as for `decode_event`."""
    created = decode_event("execution.created", snapshot["created"], payloads)
    assert isinstance(created, ExecutionCreated), "the field holds nothing else"
    new = new_execution(execution_id, created)
    changed = {
        name.removeprefix(_STEP_FIELD): _step(joined(value, payloads))
        for name, value in snapshot.items()
        if name.startswith(_STEP_FIELD)
    }
    execution = replace(
        new,
        seq=int(snapshot["seq"]),
        status=Status(snapshot["status"].decode()),
        steps={**new.steps, **changed},
        live=None,
    )
    if "x" not in snapshot:
        return execution
    members = joined(snapshot["x"], payloads)
    members["signals"] = tuple(Signal(**signal) for signal in members.get("signals") or ())
    if members.get("verdict") is not None:
        members["verdict"] = Verdict(members["verdict"])
    return replace(execution, **members)


def _read_origin(members: dict[str, Any]) -> None:
    """What came with triggers and rates; older journals have none of it."""
    members["cancel_on"] = tuple(members.get("cancel_on") or ())
    if members.get("trigger") is not None:
        members["trigger"] = Origin(**members["trigger"])
    if members.get("tokens") is not None:
        members["tokens"] = TokenShare(**members["tokens"])
    if members.get("refusal") is not None:
        members["refusal"] = Refusal(**members["refusal"])


def _step(members: dict[str, Any]) -> StepState:
    members["status"] = StepStatus(members["status"])
    members["usage"] = Usage(**members["usage"])
    if members.get("items") is not None:
        members["items"] = tuple(members["items"])
    if members.get("wait") is not None:
        members["wait"] = _wait(members["wait"])
    if members.get("resumed") is not None:
        members["resumed"] = Resumed(members["resumed"])
    return StepState(**members)


def _wait(members: dict[str, Any]) -> Wait:
    members["kind"] = WaitKind(members["kind"])
    return Wait(**members)


def _retry(members: dict[str, Any]) -> RetryPolicy:
    members["backoff"] = Backoff(members["backoff"])
    return RetryPolicy(**members)

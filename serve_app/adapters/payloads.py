"""Large members of stored records, kept apart and named by their content.

Owns the split: a record (an event, a snapshot field) that would be larger than the inline bound
keeps its small members and a map `_refs` from each large member to the name of its bytes. Knows no
store. Invariant: a record without `_refs` is whole, so whatever was written before there was a
bound reads as it did; and equal bytes have one name, so the result that a step, a snapshot and the
last event share is kept once.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import orjson

REFS = "_refs"  # no member of an event or a state can have this name
INLINE_BYTES = 65_536
_MARK = f'"{REFS}":'
_MARK_BYTES = _MARK.encode()
_SHARE = 8  # of the bound: a member below it is not worth a look-up of its own
_STAYS = frozenset({"metadata"})  # shown in lists, which read no payloads
NO_PAYLOADS: Mapping[str, bytes] = MappingProxyType({})


class Splitter:
    """Encodes the records of one commit and collects what is kept apart."""

    def __init__(self, inline_bytes: int) -> None:
        self.payloads: dict[str, bytes] = {}
        self._inline_bytes = inline_bytes

    def encode(self, record: object) -> bytes:
        """The JSON of a dataclass or a mapping with text keys."""
        data = orjson.dumps(record)
        if len(data) <= self._inline_bytes:
            return data
        members = _members(record)
        refs: dict[str, str] = {}
        for name, value in members.items():
            text = orjson.dumps(value)
            if name not in _STAYS and len(text) > self._inline_bytes // _SHARE:
                # The length is in the name, so that a reader knows what it asks for.
                refs[name] = f"{hashlib.sha256(text).hexdigest()[:32]}.{len(text)}"
                self.payloads[refs[name]] = text
                members[name] = None
        return orjson.dumps({**members, REFS: refs}) if refs else data


def references(records: Iterable[bytes | str]) -> list[str]:
    """The names of all payloads that records need, each once."""
    names: dict[str, None] = {}
    for data in records:
        # It may stand in somebody's text; the parse decides.
        if (_MARK in data) if isinstance(data, str) else (_MARK_BYTES in data):
            names.update(dict.fromkeys(orjson.loads(data).get(REFS, {}).values()))
    return list(names)


def size_of(name: str) -> int:
    """The bytes of a payload, from its name."""
    return int(name.rpartition(".")[2])


def joined(data: bytes | str, payloads: Mapping[str, bytes] | None) -> dict[str, Any]:
    """The members of a record, its payloads in their places; with None they are left out (null).

    Raises:
        KeyError: a payload is not among those given.
    """
    members: dict[str, Any] = orjson.loads(data)
    for name, reference in members.pop(REFS, {}).items():
        members[name] = None if payloads is None else orjson.loads(payloads[reference])
    return members


def _members(record: object) -> dict[str, Any]:
    if is_dataclass(record):
        return {member.name: getattr(record, member.name) for member in fields(record)}
    assert isinstance(record, dict), "records are dataclasses and dictionaries"
    return dict(record)

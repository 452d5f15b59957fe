"""Foreign documents made plain: dicts, lists and scalars that JSON has, within bounds.

Owns what may be in a document that JSON, YAML or Python gave. Does not know what it means.
Invariant: a plain document can be written as JSON, and walking it is cheap and ends.
"""

import json
import math
from collections.abc import Iterator, Mapping

from serve_app.core.errors import Problem
from serve_app.core.inference import JsonValue
from serve_app.core.template import Loc

NESTING_MAX = 64  # as deep as request bodies may be
DOCUMENT_SIZE_MAX = 1_000_000  # characters and values; YAML aliases count where they stand
PROBLEMS_MAX = 100  # more would not be read
INT_MIN, INT_MAX = -(2**63), 2**63 - 1  # what CEL and every JSON reader in use can hold


def json_bytes(value: JsonValue) -> int:
    """How large a value is as compact JSON."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def plain_document(
    document: Mapping[object, object],
) -> tuple[dict[str, JsonValue], tuple[Problem, ...]]:
    """Copy a document; where there are problems, the copy is incomplete."""
    copying = _Copying()
    plain = copying.members(document, ())
    return plain, copying.problems()


class _Copying:
    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._size_left = DOCUMENT_SIZE_MAX

    def problems(self) -> tuple[Problem, ...]:
        if self._size_left < 0:
            self._note((), f"the document is larger than {DOCUMENT_SIZE_MAX} characters")
        return tuple(self._problems)

    def members(self, value: Mapping[object, object], loc: Loc) -> dict[str, JsonValue]:
        return {key: self._value(member, (*loc, key)) for key, member in self._pairs(value, loc)}

    def _pairs(self, value: Mapping[object, object], loc: Loc) -> Iterator[tuple[str, object]]:
        for key, member in value.items():
            if isinstance(key, str) and _is_text(key):
                self._size_left -= len(key)
                yield key, member
            else:
                self._note(loc, f"the key {ascii(key)[:100]} is no text: quote it")

    def _note(self, loc: Loc, message: str) -> None:
        self._problems.append(Problem(loc, message))

    def _value(self, value: object, loc: Loc) -> JsonValue:
        self._size_left -= 1
        # Past a bound it only unwinds: aliases can stand for more than could ever be copied.
        if self._size_left < 0 or len(self._problems) >= PROBLEMS_MAX:
            return None
        if len(loc) > NESTING_MAX:
            self._note(loc, f"nests deeper than {NESTING_MAX} levels: make it flatter")
            return None
        if isinstance(value, Mapping):
            return self.members(value, loc)
        if isinstance(value, list | tuple):
            return [self._value(member, (*loc, index)) for index, member in enumerate(value)]
        return self._scalar(value, loc)

    def _scalar(self, value: object, loc: Loc) -> JsonValue:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            self._size_left -= len(value)
            if not _is_text(value):
                self._note(loc, "holds a lone surrogate, which is no text")
            return value
        if isinstance(value, int):
            if not INT_MIN <= value <= INT_MAX:
                self._note(loc, "does not fit 64 bits: write it as text")
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                self._note(loc, "is no finite number")
            return value
        self._note(loc, f"a {type(value).__name__} is no JSON value: quote it")
        return None


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)

"""ports.Expressions on cel-expr-python, the C++ runtime of the Common Expression Language.

Owns compiling, the bounds on cost, and the way back to JSON values. The library holds the GIL and
cannot be interrupted, so what an expression may cost is settled before it starts. Invariant: only
what the text mentions is converted, and a plain path such as `input.text` is never converted.
"""

import datetime
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from cel_expr_python import cel

from serve_app.core.errors import StepFailedError
from serve_app.core.template import EXPRESSION_CHARS_MAX, Outline, outline

if TYPE_CHECKING:
    from serve_app.core.inference import JsonValue

Path: TypeAlias = tuple[str | int, ...]

VARIABLES = ("input", "steps", "event", "execution", "item", "index", "args")
COMPILED_COUNT_MAX = 1_024  # about 20 KiB each; definitions share most of their expressions
# The most characters and values an evaluation may handle, counted as if nothing were shared.
# Measured (2 cores, November 2026): the worst expressions found take 1.5 s and 0.2 GiB.
COST_MAX = 32_000_000
TURNS_MAX = 10_000  # the library's own budget over all macros of an evaluation
LIST_COPY_COST = 4  # of an element that `map` and `filter` copy: 16 bytes that stay until the end
REGEX_COST = 20_000  # of `matches` in a turn: the pattern is compiled anew, up to 0.75 ms
INT_MIN, INT_MAX = -(2**63), 2**63 - 1  # CEL's int
MESSAGE_CHARS_MAX = 300
QUOTED_CHARS_MAX = 100  # of an expression named in a message

_COMPILE_ERROR = re.compile(r"ERROR: <input>:(-?\d+):(-?\d+): (.*)")
_STATUS = re.compile(r"^[A-Z_]+: | \[[A-Z_]+\]$")
# What the library can raise from compiling and evaluating; pybind11 maps C++ errors to these.
_FAILURES = (RuntimeError, ValueError, TypeError, OverflowError)


class CelExpressions:
    """Expressions over the variables of a workflow; evaluations are pure and bounded."""

    def __init__(self) -> None:
        self._env = cel.NewEnv(variables=dict.fromkeys(VARIABLES, cel.Type.DYN))
        self._compiled = functools.lru_cache(COMPILED_COUNT_MAX)(self._compile)

    def check(self, text: str) -> str | None:
        """Why the text is no expression, or None."""
        if len(text) > EXPRESSION_CHARS_MAX:
            return f"an expression has at most {EXPRESSION_CHARS_MAX} characters"
        try:
            self._compiled(text)
        except _FAILURES as error:
            return _compile_message(error)
        return None

    def evaluate(self, text: str, scope: Mapping[str, object]) -> object:
        """The value as plain JSON values.

        A timestamp becomes RFC 3339 text and a duration text such as `1.5s`. A value taken by a
        plain path is the scope's own object, not a copy.

        Raises:
            StepFailedError: not retryable: no such key, wrong types, no JSON value, too costly.
        """
        problem = self.check(text)
        if problem is not None:
            raise _failure(text, problem)
        compiled = self._compiled(text)
        try:
            if compiled.path is not None:
                return _select(scope, compiled.path)
            return _evaluated(text, compiled, scope)
        except _UnusableError as error:
            raise _failure(text, str(error)) from error
        except _FAILURES as error:
            raise _failure(text, _runtime_message(str(error))) from error

    def _compile(self, text: str) -> "_Compiled":
        found = outline(text)
        path = found.references[0].path if found.is_path and found.references else None
        # Other names are CEL's own: `map` is a type.
        is_ours = path is not None and path[0] in VARIABLES
        return _Compiled(self._env.compile(text), found, path if is_ours else None)


@dataclass(frozen=True, slots=True)
class _Compiled:
    program: cel.Expression
    outline: Outline
    path: Path | None


class _UnusableError(Exception):
    """A value or cost that an evaluation cannot have; the message is fit for the caller."""


def _failure(text: str, reason: str) -> StepFailedError:
    quoted = text if len(text) <= QUOTED_CHARS_MAX else f"{text[:QUOTED_CHARS_MAX]}…"
    return StepFailedError(f"expression `{quoted}`: {reason}", False)  # noqa: FBT003


def _select(scope: Mapping[str, object], path: Path) -> object:
    value: object = scope
    for key in path:
        if not _has(value, key):
            raise _UnusableError(_missing(path, key))
        value = value[key]  # type: ignore[index] # has it
    return value


def _has(value: object, key: str | int) -> bool:
    if isinstance(value, Mapping):
        return key in value
    return isinstance(value, list | tuple) and isinstance(key, int) and key < len(value)


def _missing(path: Path, key: str | int) -> str:
    if key == path[0]:
        return f"there is no {key} here"
    return f"there is no {key!r}; where it may be absent, ask has(…) first"


def _evaluated(text: str, compiled: _Compiled, scope: Mapping[str, object]) -> "JsonValue":
    pruned = _Pruning(scope, compiled.outline)
    if pruned.cost(text, compiled.outline) > COST_MAX:
        raise _UnusableError(
            "too costly for its input: use smaller lists and texts, or fewer nested macros"
        )
    result = compiled.program.eval(data=pruned.scope)
    # An error stands in for the whole value: none hides inside a list or a map.
    if result.type() == cel.Type.ERROR or result.type() == cel.Type.UNKNOWN:
        raise _UnusableError(_runtime_message(str(result.value())))
    return _as_json(result.plain_value())


class _Pruning:
    """The part of a scope that an expression mentions, in the dicts and lists that CEL takes."""

    def __init__(self, scope: Mapping[str, object], outlined: Outline) -> None:
        self.scope: dict[str, object] = {}
        self._weights: dict[Path, int] = {}
        self._longest = 0
        taken: list[Path] = []
        paths = {reference.path for reference in outlined.references}
        # The shorter path first: what it takes as a whole covers the longer ones.
        for path in sorted(paths, key=len):
            end, value = _walk(scope, path)
            if end is None:
                self._weights[path] = 0
                if path[0] in scope:
                    self._container(path, len(path) - 1, scope)
                continue
            self._weights[path], copied = self._copy(value)
            if any(end[: len(known)] == known for known in taken):
                continue
            self._container(end, len(end) - 1, scope)[str(end[-1])] = copied
            taken.append(end)

    def cost(self, text: str, outlined: Outline) -> int:
        """An upper bound on the characters and values that evaluating can touch or make.

        Every mention of a name handles its value once, inside macros once per turn; a macro whose
        body mentions its variable k times can make its list k times as large, and chained macros
        multiply. `map` and `filter` copy the list so far in every turn.
        """
        longest = (self._longest + text.count(",") + 1) * (1 + text.count("+"))
        turns = min(TURNS_MAX, longest**outlined.macro_depth) if outlined.macro_depth else 1
        growth = math.prod(max(1, uses) for uses in outlined.macro_uses)
        once = sum(self._weight(r.path) for r in outlined.references if r.macro_depth == 0)
        again = sum(self._weight(r.path) for r in outlined.references if r.macro_depth > 0)
        copies = LIST_COPY_COST * (text.count("map") + text.count("filter"))
        fixed = copies * min(longest, TURNS_MAX) + REGEX_COST * text.count("matches")
        each = (again + len(text)) * growth + fixed
        return once * growth + turns * each if outlined.macro_depth else once + len(text)

    def _weight(self, path: Path) -> int:
        return self._weights.get(path, 0)

    def _container(self, path: Path, depth: int, scope: Mapping[str, object]) -> dict[str, object]:
        """The dict that holds the last key of the path, made as far as the scope has it."""
        container, source = self.scope, scope
        for key in path[:depth]:
            member = source.get(str(key))
            if not isinstance(member, Mapping):
                break
            made = container.setdefault(str(key), {})
            assert isinstance(made, dict), "only maps lie on the way"
            container, source = made, member
        return container

    def _copy(self, value: object) -> tuple[int, object]:
        """The weight of a value, and the value in plain dicts and lists."""
        if value is None or isinstance(value, bool | float):
            return 1, value
        if isinstance(value, str):
            return len(value) + 1, str(value)
        if isinstance(value, int):
            if not INT_MIN <= value <= INT_MAX:
                raise _UnusableError(f"{value} is beyond the 64-bit integers that CEL has")
            return 1, value
        if isinstance(value, Mapping):
            return self._copy_map(value)
        if isinstance(value, Sequence):
            return self._copy_list(value)
        raise _UnusableError(f"a {type(value).__name__} is no JSON value")

    def _copy_map(self, value: Mapping[object, object]) -> tuple[int, object]:
        self._longest = max(self._longest, len(value))
        weight, copied = 1, {}
        for key, member in value.items():
            member_weight, copied[str(key)] = self._copy(member)
            weight += member_weight + len(str(key))
        return self._bounded(weight), copied

    def _copy_list(self, value: Sequence[object]) -> tuple[int, object]:
        self._longest = max(self._longest, len(value))
        weight, copied = 1, []
        for member in value:
            member_weight, member_copy = self._copy(member)
            weight += member_weight
            copied.append(member_copy)
        return self._bounded(weight), copied

    @staticmethod
    def _bounded(weight: int) -> int:
        if weight > COST_MAX:
            raise _UnusableError(f"it reads more than {COST_MAX} characters and values")
        return weight


def _walk(scope: Mapping[str, object], path: Path) -> tuple[Path | None, object]:
    """How far the path leads through maps, and the value there; None: a key is missing.

    A path ends at the first value that is no map: lists are taken whole, so that indexes fit.
    """
    value: object = scope
    for index, key in enumerate(path):
        if not isinstance(value, Mapping) or isinstance(key, int):
            return path[:index], value
        if key not in value:
            return None, None
        value = value[key]
    return path, value


def _as_json(value: object) -> "JsonValue":
    if isinstance(value, float) and not math.isfinite(value):
        raise _UnusableError(f"the value is {value}, which JSON does not have")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_as_json(member) for member in value]
    if isinstance(value, dict):
        return {_as_key(key): _as_json(member) for key, member in value.items()}
    if isinstance(value, datetime.datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, datetime.timedelta):
        return f"{value.total_seconds():.6f}".rstrip("0").rstrip(".") + "s"
    if isinstance(value, bytes | bytearray):
        raise _UnusableError("the value is bytes, which JSON does not have; use string(…)")
    raise _UnusableError(f"the value is a {type(value).__name__}, which JSON does not have")


def _as_key(key: object) -> str:
    if isinstance(key, str):
        return key
    raise _UnusableError(f"the map key {key!r} is no text; use string(…)")


def _compile_message(error: Exception) -> str:
    places = _COMPILE_ERROR.findall(str(error))
    if not places:
        return _runtime_message(str(error))
    message = "; ".join(
        what.replace(" (in container '')", "")
        + (f" (line {line}, column {column})" if int(line) > 0 else "")
        for line, column, what in places
    )
    return _runtime_message(message)


def _runtime_message(message: str) -> str:
    message = _STATUS.sub("", message.splitlines()[0] if message else "failed")
    message = message.replace("Key not found in map :", "there is no key")
    if message.startswith("there is no key"):
        message += "; where it may be absent, ask has(…) first"
    return message[:MESSAGE_CHARS_MAX]

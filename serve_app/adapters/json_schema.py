"""JSON Schema (Draft 2020-12) on jsonschema-rs: checking schemas, and values against them.

Owns the bounds on schemas, which callers may bring themselves. Formats are annotations, as the
draft has it; patterns run on a linear engine, so look-around and back-references are refused.
Invariant: nothing is ever fetched, and no schema takes exponential time on a value.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast
from urllib.parse import unquote

import jsonschema_rs

from serve_app.core.errors import Problem

if TYPE_CHECKING:
    from serve_app.core.inference import JsonValue

Schema: TypeAlias = "dict[str, JsonValue] | bool"

SCHEMA_CHARS_MAX = 65_536  # as canonical JSON; the largest that people write have some 20 KiB
APPLICATIONS_MAX = 20_000  # subschemas once every reference is written out: what one value may cost
DEPTH_MAX = 100  # levels, references followed
WORK_MAX = 1_000_000  # the same for a schema that refers to itself, over a value's whole depth
REGEX_BYTES_MAX = 1_048_576  # of one compiled pattern
COMPILED_COUNT_MAX = 256  # validators
PROBLEMS_MAX = 20  # more would not be read
SORTED_MAX = 1_000  # problems looked at before the first ones are chosen
MESSAGE_CHARS_MAX = 200

# Where subschemas stand (JSON Schema 2020-12, core section 10 and 11): alone, in a list, in a map.
_SINGLE = (
    "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("dependentSchemas", "patternProperties", "properties")


class JsonSchemas:
    """Checks that never leave the process; compiled validators are kept."""

    def __init__(self) -> None:
        self._compiled = functools.lru_cache(COMPILED_COUNT_MAX)(_Validator)

    def check(self, schema: object) -> str | None:
        """Why this is no usable schema and what to change, or None."""
        try:
            self._validator(schema)
        except _UnusableSchemaError as error:
            return str(error)
        return None

    def problems(self, schema: object, value: object) -> tuple[Problem, ...]:
        """What is wrong with the value, by place; at most `PROBLEMS_MAX`, and none when it fits.

        A schema that cannot be used is the one problem reported, at the value's root.
        """
        try:
            return self._validator(schema).problems(value)
        except _UnusableSchemaError as error:
            return (Problem((), f"the schema cannot be used: {error}"),)

    def _validator(self, schema: object) -> "_Validator":
        if not isinstance(schema, Mapping | bool):
            raise _UnusableSchemaError("a JSON Schema is an object, such as {type: object}")
        try:
            text = json.dumps(schema, sort_keys=True, default=_plain, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise _UnusableSchemaError(f"the schema is no JSON: {error}") from error
        if len(text) > SCHEMA_CHARS_MAX:
            raise _UnusableSchemaError(f"the schema has more than {SCHEMA_CHARS_MAX} characters")
        return self._compiled(text)


class _UnusableSchemaError(Exception):
    """The schema is invalid, too large, or wants something from outside."""


class _Validator:
    """One compiled schema and what it may cost."""

    def __init__(self, text: str) -> None:
        schema = cast("Schema", json.loads(text))
        self._cost = _Expansion(schema)
        try:
            self._validator = jsonschema_rs.Draft202012Validator(
                schema,
                offline=True,  # refuses every reference out of the document
                validate_formats=False,
                mask="the value",
                pattern_options=jsonschema_rs.RegexOptions(
                    size_limit=REGEX_BYTES_MAX, dfa_size_limit=REGEX_BYTES_MAX
                ),
            )
        except (ValueError, jsonschema_rs.ReferencingError) as error:
            raise _UnusableSchemaError(_schema_message(error)) from error

    def problems(self, value: object) -> tuple[Problem, ...]:
        if self._cost.exceeds(_depth(value)):
            return (Problem((), "nested too deeply for a schema that refers to itself"),)
        try:
            found = [
                _problem(error)
                for error in itertools.islice(
                    self._validator.iter_errors(_plain_value(value)), SORTED_MAX
                )
            ]
        except (ValueError, TypeError) as error:
            return (Problem((), f"the value is no JSON: {error}"[:MESSAGE_CHARS_MAX]),)
        found.sort(key=_order)
        return tuple(found[:PROBLEMS_MAX])


class _Expansion:
    """How much work a schema can make on one value, its references written out.

    Each alternative that leads to the same definition is validated by itself, so 20 definitions
    that name the next one twice make a million applications (measured: 18 take 13 s). The walk
    counts them. A reference back to a schema it is inside of is not followed but counted: every
    level of the value can multiply the work by their number.
    """

    def __init__(self, schema: Schema) -> None:
        self._root = schema
        self._applications = 0
        self._returns = 0
        self._inside: list[str] = ["#"]
        self._visit(schema, depth=0)

    def exceeds(self, depth: int) -> bool:
        """Whether a value of this depth may take more than `WORK_MAX` applications."""
        return self._returns > 1 and self._applications * self._returns**depth > WORK_MAX

    def _visit(self, schema: object, depth: int) -> None:
        self._applications += 1
        if depth > DEPTH_MAX:
            raise _UnusableSchemaError(f"the schema nests deeper than {DEPTH_MAX} levels")
        if self._applications > APPLICATIONS_MAX:
            raise _UnusableSchemaError(
                f"the schema has more than {APPLICATIONS_MAX} parts once its references are "
                "written out: name shared definitions fewer times"
            )
        if not isinstance(schema, dict):
            return
        if "$id" in schema and schema is not self._root:
            raise _UnusableSchemaError("$id is only allowed at the top: name parts in $defs")
        for key in ("$ref", "$dynamicRef"):
            if isinstance(schema.get(key), str):
                self._follow(unquote(schema[key]), depth)
        for member in _subschemas(schema):
            self._visit(member, depth + 1)

    def _follow(self, reference: str, depth: int) -> None:
        if reference in self._inside:
            self._returns += 1
            return
        self._inside.append(reference)
        self._visit(self._target(reference), depth + 1)
        self._inside.pop()

    def _target(self, reference: str) -> object:
        if not (reference == "#" or reference.startswith("#/")):
            raise _UnusableSchemaError(
                f"$ref {reference[:MESSAGE_CHARS_MAX]!r} is not followed: only references inside "
                "the schema are, such as #/$defs/name"
            )
        target: object = self._root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                raise _UnusableSchemaError(f"$ref {reference!r} leads nowhere: define it in $defs")
        return target


def _subschemas(schema: dict[str, object]) -> Iterator[object]:
    for key in _SINGLE:
        if key in schema:
            yield schema[key]
    for key in _LISTS:
        members = schema.get(key)
        if isinstance(members, list):
            yield from members
    for key in _MAPS:
        named = schema.get(key)
        if isinstance(named, dict):
            yield from named.values()


def _schema_message(error: Exception) -> str:
    if not isinstance(error, jsonschema_rs.ValidationError):
        return str(error)[:MESSAGE_CHARS_MAX]
    place = "/".join(str(part) for part in error.instance_path)
    message = error.message[:MESSAGE_CHARS_MAX]
    if place.endswith("pattern") or "patternProperties" in place:
        message += " (look-around and back-references are not supported)"
    return f"at {place}: {message}" if place else message


def _problem(error: jsonschema_rs.ValidationError) -> Problem:
    loc, kind = tuple(error.instance_path), error.kind
    match kind:
        case jsonschema_rs.ValidationErrorKind.Required():
            return Problem((*loc, kind.property), "is required: add it")
        case jsonschema_rs.ValidationErrorKind.AdditionalProperties() if kind.unexpected:
            return Problem((*loc, kind.unexpected[0]), "is not known here: remove it")
        case jsonschema_rs.ValidationErrorKind.Type():
            return Problem(loc, f"must be of type {' or '.join(kind.types)}")
        case jsonschema_rs.ValidationErrorKind.Enum():
            options = ", ".join(json.dumps(option) for option in kind.options)
            return Problem(loc, f"must be one of {options}"[:MESSAGE_CHARS_MAX])
        case _:
            return Problem(loc, error.message[:MESSAGE_CHARS_MAX])


def _order(problem: Problem) -> tuple[tuple[bool, int, str], ...]:
    """By place; an index sorts as a number, before any key."""
    return tuple(
        (False, part, "") if isinstance(part, int) else (True, 0, part) for part in problem.loc
    )


def _depth(value: object) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _plain_value(value: object) -> object:
    """The value in dicts and lists: the library takes no other mappings."""
    if isinstance(value, Mapping):
        return {key: _plain_value(member) for key, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain_value(member) for member in value]
    return value


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is no JSON value")

"""The `{{ expression }}` texts of a definition: finding, checking and filling them in.

Owns the lexical side of expressions: where one begins and ends, and which names it mentions. Does
not evaluate: the caller hands in a function. Invariant: what stands inside a CEL string literal is
never read as code, neither as the end of an expression nor as a reference.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from serve_app.core.errors import ErrorCode, ServeAppError, StepFailedError
from serve_app.core.inference import JsonValue

Loc: TypeAlias = tuple[str | int, ...]

OPEN, CLOSE = "{{", "}}"
EXPRESSION_CHARS_MAX = 4_096  # a screenful; what is longer belongs in a step of its own
TEMPLATE_CHARS_MAX = 100_000  # one text of a definition: a long prompt with examples
RENDERED_CHARS_MAX = 16_777_216  # all that one `render` gives: a 10 MiB input and room around it
NESTING_MAX = 64  # as deep as request bodies may be
SPLIT_CACHE_COUNT = 512  # texts; the shipped definitions have about twenty

# One token of CEL (cel-spec, "Syntax", lexis). A raw literal (r"…") knows no escapes, and only
# triple-quoted ones may span lines.
TOKEN = re.compile(
    r"""
    (?P<space>\s+ | //[^\n]*)
  | (?P<string>
        (?:[rR][bB]?|[bB][rR]) (?: \"{3}.*?\"{3} | '{3}.*?'{3} | "[^"\n]*" | '[^'\n]*' )
      | [bB]? (?: \"{3}(?:[^\\]|\\.)*?\"{3} | '{3}(?:[^\\]|\\.)*?'{3}
                | "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' )
    )
  | (?P<number>(?:\d|\.\d)[\w.]*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)


class TemplateError(ServeAppError):
    """A text whose `{{` and `}}` do not pair up; the message names the place."""

    code = ErrorCode.INVALID_WORKFLOW


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of plain text, or the text of one expression without its braces."""

    text: str
    is_expression: bool


def render(value: JsonValue, evaluate: Callable[[str], object]) -> JsonValue:
    """Fill in every expression of a value; the keys of objects are left as they are.

    A string that is exactly one `{{ … }}` becomes the expression's value, type kept. Otherwise the
    text is put together: strings as they are, numbers, booleans, objects and lists as compact
    JSON, and null as nothing at all, because null is what a skipped step or an absent answer
    gives, and a prompt that mentions it should read as if that part were not there. Who wants the
    word writes `x == null ? "null" : x`.

    Args:
        value: from a checked definition.
        evaluate: gives an expression's value as JSON-like Python values; its errors pass through.

    Raises:
        StepFailedError: not retryable: the result is larger than `RENDERED_CHARS_MAX`.
        TemplateError: the value was never checked and does not parse.
    """
    return _Rendering(evaluate).value(value)


def expressions_in(value: JsonValue) -> list[tuple[Loc, str]]:
    """List every expression of a value with its place, in document order.

    Raises:
        TemplateError: a text that does not parse; `split` its texts singly to find all of them.
    """
    return [
        (loc, piece.text)
        for loc, text in texts_in(value)
        for piece in split(text)
        if piece.is_expression
    ]


def texts_in(value: JsonValue, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    """Yield every string of a value, keys excepted, with its place."""
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, Mapping):
        for key, member in value.items():
            yield from texts_in(member, (*loc, key))
    elif isinstance(value, Sequence):
        for index, member in enumerate(value):
            yield from texts_in(member, (*loc, index))


@lru_cache(maxsize=SPLIT_CACHE_COUNT)
def split(text: str) -> tuple[Piece, ...]:
    """Cut a text into plain stretches and expressions; no piece is empty.

    Raises:
        TemplateError: an expression that is not closed, empty or too long, or too long a text.
    """
    if len(text) > TEMPLATE_CHARS_MAX:
        raise TemplateError(f"the text has more than {TEMPLATE_CHARS_MAX} characters: shorten it")
    pieces: list[Piece] = []
    position = 0
    while (start := text.find(OPEN, position)) >= 0:
        if start > position:
            pieces.append(Piece(text[position:start], is_expression=False))
        end = _expression_end(text, start)
        expression = text[start + len(OPEN) : end].strip()
        if not expression:
            raise TemplateError(f"the {OPEN} {CLOSE} at {_place(text, start)} holds no expression")
        if len(expression) > EXPRESSION_CHARS_MAX:
            raise TemplateError(
                f"the expression at {_place(text, start)} has more than {EXPRESSION_CHARS_MAX} "
                "characters: split it over several transform steps"
            )
        pieces.append(Piece(expression, is_expression=True))
        position = end + len(CLOSE)
    if position < len(text):
        pieces.append(Piece(text[position:], is_expression=False))
    return tuple(pieces)


def _expression_end(text: str, start: int) -> int:
    """Index of the `}}` that closes the `{{` at `start`.

    Comments are not looked for here: one would hide the closing braces that follow it.
    """
    position, depth = start + len(OPEN), 0
    while position < len(text):
        if depth == 0 and text.startswith(CLOSE, position):
            return position
        match = TOKEN.match(text, position)
        assert match is not None, "the last alternative takes any character"
        token = match.group()
        if token in ("'", '"'):
            raise TemplateError(f"the string literal at {_place(text, position)} is not closed")
        depth += (token == "{") - (token == "}")
        position += 1 if token.startswith("//") else len(token)
    raise TemplateError(
        f"the {OPEN} at {_place(text, start)} is not closed: add {CLOSE}, "
        f'or write {OPEN} "{OPEN}" {CLOSE} to mean the braces themselves'
    )


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return f"line {line}, column {column}"


class _Rendering:
    """One call of `render`: the evaluator and what is left of the size budget."""

    def __init__(self, evaluate: Callable[[str], object]) -> None:
        self._evaluate = evaluate
        self._chars_left = RENDERED_CHARS_MAX

    def value(self, template: JsonValue) -> JsonValue:
        if isinstance(template, str):
            return self._text(template)
        if isinstance(template, Mapping):
            return {key: self.value(member) for key, member in template.items()}
        if isinstance(template, Sequence):
            return [self.value(member) for member in template]
        return template

    def _text(self, template: str) -> JsonValue:
        if OPEN not in template:
            return template
        pieces = split(template)
        if len(pieces) == 1:
            value = plain(self._evaluate(pieces[0].text))
            self._spend(value)
            return value
        parts: list[str] = []
        for piece in pieces:
            part = as_text(self._evaluate(piece.text)) if piece.is_expression else piece.text
            self._spend(part)
            parts.append(part)
        return "".join(parts)

    def _spend(self, value: JsonValue) -> None:
        """Count what the value adds, were it written out.

        A value may stand in many places by reference; the store and the engine write it each time.
        """
        self._chars_left -= len(value) if isinstance(value, str) else 1
        if self._chars_left < 0:
            raise StepFailedError(
                f"the filled-in templates are larger than {RENDERED_CHARS_MAX} characters", False
            )
        if isinstance(value, Mapping):
            for key, member in value.items():
                self._chars_left -= len(key)
                self._spend(member)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for member in value:
                self._spend(member)


def as_text(value: object) -> str:
    """The text that an expression's value contributes to a longer text."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def plain(value: object) -> JsonValue:
    """Check that a value is JSON, and give it in plain dicts and lists.

    Raises:
        StepFailedError: not retryable: it is not.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(member) for member in value]
    raise StepFailedError(f"a {type(value).__name__} is no JSON value", False)

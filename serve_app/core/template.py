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

# A literal without escapes: its content is what stands between the quotes.
_PLAIN_STRING = re.compile(r"""(?P<quote>["'])(?P<content>[^"'\\\n]+)(?P=quote)""")
MACROS = frozenset({"all", "exists", "exists_one", "filter", "map"})
LITERALS = frozenset({"true", "false", "null", "in"})


class TemplateError(ServeAppError):
    """A text whose `{{` and `}}` do not pair up; the message names the place."""

    code = ErrorCode.INVALID_WORKFLOW


@dataclass(frozen=True, slots=True)
class Reference:
    """One mention of a free name in an expression.

    Args:
        path: the name and the literal keys and indexes selected from it, as far as they go.
        macro_depth: how many macro bodies it stands in; each of their turns evaluates it anew.
    """

    path: tuple[str | int, ...]
    macro_depth: int


@dataclass(frozen=True, slots=True)
class Outline:
    """What can be told of an expression without evaluating it.

    Args:
        references: the free names it mentions, in order; a superset, never less.
        macro_uses: for each macro, how often its body mentions the macro's variable.
        macro_depth: how deep macros nest; 0 when there are none.
        is_path: whether it is one reference and nothing else.
    """

    references: tuple[Reference, ...]
    macro_uses: tuple[int, ...]
    macro_depth: int
    is_path: bool


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
        lexeme = match.group()
        if lexeme in {"'", '"'}:
            raise TemplateError(f"the string literal at {_place(text, position)} is not closed")
        depth += (lexeme == "{") - (lexeme == "}")
        position += 1 if lexeme.startswith("//") else len(lexeme)
    raise TemplateError(
        f"the {OPEN} at {_place(text, start)} is not closed: add {CLOSE}, "
        f'or write {OPEN} "{OPEN}" {CLOSE} to mean the braces themselves'
    )


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return f"line {line}, column {column}"


def outline(text: str) -> Outline:
    """Find the names an expression mentions, macro variables told apart from free names."""
    return _Outlining(text).outline()


class _Outlining:
    """One pass over the tokens of an expression; `_open` holds the brackets around the place."""

    def __init__(self, text: str) -> None:
        self._tokens = [
            (match.lastgroup or "", match.group())
            for match in TOKEN.finditer(text)
            if match.lastgroup != "space"
        ]
        self._open: list[_Macro | None] = []
        self._macros: list[_Macro] = []
        self._references: list[Reference] = []
        self._macro_depth = 0

    def outline(self) -> Outline:
        index, is_path = 0, False
        while index < len(self._tokens):
            kind, lexeme = self._tokens[index]
            if lexeme in {"(", "[", "{"}:
                self._enter(index)
            elif lexeme in {")", "]", "}"} and self._open:
                self._open.pop()
            elif kind == "name" and self._is_value(index):
                end = self._mention(index)
                is_path = index == 0 and end == len(self._tokens)
                index = end
                continue
            index += 1
        uses = tuple(macro.uses for macro in self._macros)
        return Outline(tuple(self._references), uses, self._macro_depth, is_path)

    def _lexeme(self, index: int) -> str:
        return self._tokens[index][1] if 0 <= index < len(self._tokens) else ""

    def _enter(self, index: int) -> None:
        is_macro = (
            self._lexeme(index) == "("
            and self._lexeme(index - 1) in MACROS
            and self._lexeme(index - 2) == "."
        )
        if not is_macro:
            self._open.append(None)
            return
        macro = _Macro(self._lexeme(index + 1))
        self._macros.append(macro)
        self._open.append(macro)
        self._macro_depth = max(self._macro_depth, self._depth())

    def _depth(self) -> int:
        return sum(macro is not None for macro in self._open)

    def _is_value(self, index: int) -> bool:
        """Whether the name is neither a member, a function, a literal nor a declaration."""
        is_declaration = (
            self._lexeme(index - 1) == "("
            and self._lexeme(index + 1) == ","
            and bool(self._open)
            and self._open[-1] is not None
        )
        return (
            self._lexeme(index) not in LITERALS
            and not self._is_member(index)
            and self._lexeme(index + 1) != "("
            and not is_declaration
        )

    def _is_member(self, index: int) -> bool:
        """Whether the name follows `value.`; a dot without a value means the outermost scope."""
        if self._lexeme(index - 1) != ".":
            return False
        kind, lexeme = self._tokens[index - 2] if index > 1 else ("mark", "")
        return lexeme in {")", "]", "}", "`"} or (kind != "mark" and lexeme != "in")

    def _mention(self, index: int) -> int:
        """Note the name at `index` with what is selected from it; return where that ends."""
        name = self._lexeme(index)
        path: list[str | int] = [name]
        end = index + 1
        while (selected := self._selector(end)) is not None:
            key, end = selected
            path.append(key)
        for macro in reversed(self._open):
            if macro is not None and macro.variable == name:
                macro.uses += 1
                return end
        self._references.append(Reference(tuple(path), self._depth()))
        return end

    def _selector(self, index: int) -> tuple[str | int, int] | None:
        """The literal key or index selected at `index` and the place after it."""
        if self._lexeme(index) == ".":
            is_member = index + 1 < len(self._tokens) and self._tokens[index + 1][0] == "name"
            if is_member and self._lexeme(index + 2) != "(":
                return self._lexeme(index + 1), index + 2
        elif self._lexeme(index) == "[" and self._lexeme(index + 2) == "]":
            kind, lexeme = self._tokens[index + 1]
            if kind == "number" and lexeme.isdecimal():
                return int(lexeme), index + 3
            if kind == "string" and (key := _PLAIN_STRING.fullmatch(lexeme)):
                return key["content"], index + 3
        return None


@dataclass(slots=True)
class _Macro:
    variable: str
    uses: int = 0


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
                f"the filled-in templates are larger than {RENDERED_CHARS_MAX} characters",
                False,  # noqa: FBT003 - positional, so that it pickles
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
    raise StepFailedError(f"a {type(value).__name__} is no JSON value", False)  # noqa: FBT003

"""What a model reads and writes of tools: their description, the grammar of a turn, a call.

A call is a JSON object and nothing else, `{"tool_call": {"name": …, "arguments": …}}`, described in
the system message and held to by the engine's structured output. So every model can call tools,
whatever its chat template knows of them, and a call always parses. Invariant: a text is a call or
an answer by its first characters, so that an answer can be streamed as it comes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from serve_app.core.inference import JsonValue, Message
from serve_app.core.tools import TOOL_CALL, Tool, Turn

OPENING = f'{{"{TOOL_CALL}"'  # how a call begins, without white space
_IS_CALL = re.compile(rf'\s*\{{\s*"{TOOL_CALL}"')
_LAST = "\n\nAnswer now: no tool can be called any more."
_HOW = """You can call tools. To call one, reply with only this JSON, in one line:
{"tool_call": {"name": "<tool>", "arguments": {<arguments>}}}
You are then given its result, and can call a tool again or answer.
Tools, each with the JSON Schema of its arguments:"""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the model wrote it; nobody has checked it against the tool's schema."""

    name: str
    arguments: Mapping[str, JsonValue]


def messages_of(turn: Turn, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation of a turn: what was asked, with the tools described, and the rounds."""
    described = "\n".join([_HOW, *(_line(tool) for tool in turn.tools)])
    first, rest = messages[0], messages[1:]
    if first.role == "system":
        system = Message("system", f"{first.content}\n\n{described}")
    else:
        system, rest = Message("system", described), messages
    rounds: list[Message] = []
    for index, (said, told) in enumerate(turn.exchanges, start=1):
        is_last = index == len(turn.exchanges) and not turn.callable
        rounds.append(Message("assistant", said))
        rounds.append(Message("user", told + _LAST if is_last else told))
    return (system, *rest, *rounds)


def grammar_of(turn: Turn, output_schema: Mapping[str, JsonValue] | None) -> str | None:
    """What the engine may write, in the Lark dialect of llguidance; None: nothing but an answer."""
    if not turn.callable:
        return None
    schemas = {tool.name: tool.parameters for tool in turn.tools}
    calls = " | ".join(
        f'{_quoted(OPENING)} ": {{\\"name\\": " {_quoted(json.dumps(name))} '
        f'", \\"arguments\\": " {_json(schemas[name])} "}}}}"'
        for name in turn.callable
    )
    rules = ["%llguidance {}", f"start: {'call' if turn.must_call else 'call | answer'}"]
    rules.append(f"call: {calls}")
    if not turn.must_call:
        rules.append(f"answer: {'TEXT' if output_schema is None else _json(output_schema)}")
        if output_schema is None:
            rules.append(f"TEXT: /{_not_beginning_with(OPENING)}/")
    return "\n".join([*rules, ""])


def is_call(text: str) -> bool | None:
    """Whether a turn, as far as it has come, is a call; None: too little has come to tell."""
    if _IS_CALL.match(text):
        return True
    squeezed = re.sub(r"\s", "", text[: 4 * len(OPENING)])
    return None if OPENING.startswith(squeezed) else False


def read_call(text: str, turn: Turn) -> Call:
    """The call that a text is.

    Raises:
        ValueError: it is none, in words for the model.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the call is no JSON: {error}") from error
    call = found.get(TOOL_CALL) if isinstance(found, dict) and len(found) == 1 else None
    members = call if isinstance(call, dict) else {}
    if members.keys() != {"name", "arguments"} or not isinstance(members["arguments"], dict):
        raise ValueError('a call has the form {"tool_call": {"name": …, "arguments": {…}}}')
    name = members["name"]
    if name not in turn.callable:
        known = ", ".join(turn.callable)
        raise ValueError(f"there is no tool {str(name)[:100]!r} to call now; there are: {known}")
    return Call(name, members["arguments"])


def _line(tool: Tool) -> str:
    return f"- {tool.name}: {tool.description} {json.dumps(tool.parameters, ensure_ascii=False)}"


def _json(schema: Mapping[str, JsonValue]) -> str:
    # White space between tokens is where small models get lost.
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _not_beginning_with(marker: str) -> str:
    """A regular expression of all texts but the empty one and those that begin so."""
    pattern = ""
    for character in reversed(marker):
        other = rf"[^{_escaped(character)}](.|\n)*"
        pattern = f"({other}|{_escaped(character)}{pattern}?)" if pattern else f"({other})"
    return pattern


def _escaped(character: str) -> str:
    return character if character.isalnum() or character in '_"' else f"\\{character}"

"""Structural tags, as vLLM's tool parsers write them, in the language of our grammar engine.

vLLM 0.32 constrains tool calls with structural tags of xgrammar; one engine runs one grammar
engine, and ours is llguidance, which takes more of JSON Schema and reads Lark grammars. Owns the
translation of the two forms that function calls take. Invariant: a tag that it cannot express is
refused, never loosened.
"""

import json
from collections.abc import Mapping
from typing import Any

from serve_app.core.errors import InvalidPromptError

_FREE_TEXT = r"/(.|\n)*/"


def lark_of(structural_tag: str) -> str:
    """The same language as a Lark grammar for llguidance.

    Raises:
        InvalidPromptError: it holds more than function calls with JSON arguments.
    """
    layout = json.loads(structural_tag).get("format", {})
    tags = layout.get("tags") or ()
    match layout:
        case {"type": "triggered_tags", "triggers": [str(trigger)]} if tags:
            # Free text up to the trigger, again and again; the lexer must stop at the first one.
            rules = [f"head[lazy]: TEXT {_text(trigger)}", f"TEXT: {_FREE_TEXT}"]
            rules += [f"tag_{index}: head {_call(tag, trigger)}" for index, tag in enumerate(tags)]
            start = "tag* TEXT"
        case {"type": "tags_with_separator", "separator": "", "at_least_one": True} if tags:
            rules = [f"tag_{index}: {_call(tag, '')}" for index, tag in enumerate(tags)]
            start = "tag" if layout.get("stop_after_first") else "tag+"
        case _:
            raise InvalidPromptError("the tools need a grammar that this service does not write")
    any_tag = " | ".join(f"tag_{index}" for index in range(len(tags)))
    return "\n".join(["%llguidance {}", f"start: {start}", f"tag: {any_tag}", *rules, ""])


def _call(tag: Mapping[str, Any], trigger: str) -> str:
    """One tag without its trigger: opening, arguments, end."""
    match tag:
        case {"begin": str(begin), "content": {"type": "json_schema"} as content, "end": str(end)}:
            schema = content["json_schema"]
        case _:
            raise InvalidPromptError("a tool's arguments are not described by a JSON Schema")
    if not begin.startswith(trigger):
        raise InvalidPromptError("a tool call does not begin with its trigger")
    if isinstance(schema, dict):
        # White space between tokens is where small models get lost.
        schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    arguments = f"%json {json.dumps(schema if schema is not True else {})}"
    return f"{_text(begin.removeprefix(trigger))} {arguments} {_text(end)}"


def _text(text: str) -> str:
    return json.dumps(text) if text else ""

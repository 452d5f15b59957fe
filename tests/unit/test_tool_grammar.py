"""Structural tags become Lark grammars, or are refused."""

import json

import pytest

from serve_app.adapters.vllm_tool_grammar import lark_of
from serve_app.core.errors import InvalidPromptError

TAG = {
    "type": "tag",
    "begin": '<tool_call>{"name": "f", "arguments": ',
    "content": {"type": "json_schema", "json_schema": {"type": "object"}},
    "end": "}</tool_call>",
}
CALL = r'"<tool_call>{\"name\": \"f\", \"arguments\": " %json {"type": "object", '


def grammar(**layout: object) -> str:
    return lark_of(json.dumps({"type": "structural_tag", "format": layout}))


@pytest.mark.parametrize(("is_single", "start"), [(True, "start: tag\n"), (False, "start: tag+\n")])
def test_forced_call_is_nothing_but_calls(*, is_single: bool, start: str) -> None:
    lark = grammar(
        type="tags_with_separator",
        separator="",
        at_least_one=True,
        stop_after_first=is_single,
        tags=[TAG, TAG],
    )
    assert start in lark
    assert lark.count(CALL) == 2
    assert "tag: tag_0 | tag_1" in lark


def test_free_call_begins_with_its_trigger_after_any_text() -> None:
    lark = grammar(type="triggered_tags", triggers=["<tool_call>"], tags=[TAG])
    assert "start: tag* TEXT" in lark
    assert 'head[lazy]: TEXT "<tool_call>"' in lark
    assert r'tag_0: head "{\"name\": ' in lark


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"type": "triggered_tags", "triggers": ["<a>", "<b>"], "tags": [TAG]},
        {"type": "triggered_tags", "triggers": ["<other>"], "tags": [TAG]},
        {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": []},
        {"type": "tags_with_separator", "separator": ",", "at_least_one": True, "tags": [TAG]},
        {"type": "tags_with_separator", "separator": "", "at_least_one": False, "tags": [TAG]},
        {
            "type": "tags_with_separator",
            "separator": "",
            "at_least_one": True,
            "tags": [{**TAG, "content": {"type": "regex", "pattern": "a"}}],
        },
    ],
)
def test_what_it_cannot_say_is_refused(layout: dict[str, object]) -> None:
    with pytest.raises(InvalidPromptError):
        grammar(**layout)

"""Templates: `{{ expression }}` inside JSON-like values."""

from collections.abc import Callable
from functools import lru_cache
import json

from serve_app.core.inference import JsonValue


@lru_cache(maxsize=4096)
def split(text):
    parts = []
    at = 0
    while (start := text.find("{{", at)) >= 0:
        end = text.find("}}", start)
        if end < 0:
            raise ValueError("unclosed {{")
        if start > at:
            parts.append((False, text[at:start]))
        parts.append((True, text[start + 2 : end].strip()))
        at = end + 2
    if at < len(text):
        parts.append((False, text[at:]))
    return tuple(parts)


def render(value: JsonValue, evaluate: Callable[[str], object]) -> JsonValue:
    if isinstance(value, str):
        parts = split(value)
        if len(parts) == 1 and parts[0][0]:
            return evaluate(parts[0][1])
        out = []
        for is_e, t in parts:
            v = evaluate(t) if is_e else t
            out.append(v if isinstance(v, str) else json.dumps(v))
        return "".join(out)
    if isinstance(value, dict):
        return {k: render(v, evaluate) for k, v in value.items()}
    if isinstance(value, list):
        return [render(v, evaluate) for v in value]
    return value


def expressions_in(value, loc=()):
    if isinstance(value, str):
        return [(loc, t) for e, t in split(value) if e]
    if isinstance(value, dict):
        return [x for k, v in value.items() for x in expressions_in(v, (*loc, k))]
    if isinstance(value, list):
        return [x for k, v in enumerate(value) for x in expressions_in(v, (*loc, k))]
    return []

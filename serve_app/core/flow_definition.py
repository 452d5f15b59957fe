"""The flow control of a definition: `concurrency`, `rateLimit`, `cache`.

Owns their form. Does not enforce them. Invariant: a key's expression sees the input and the
execution alone, because it is evaluated before any step has run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from serve_app.core.definition_checks import Checks
from serve_app.core.inference import MAX_TOKENS_DEFAULT, JsonValue
from serve_app.core.step_graph import Level, Place
from serve_app.core.template import Loc
from serve_app.core.workflow import (
    GENERATE,
    Concurrency,
    FlowControl,
    RateLimit,
    Step,
    every_step,
)

LIMIT_MAX = 100_000
CONCURRENCY_KEYS = ("limit", "key", "onLimit")
TOKENS_MAX = 10**12
RATE_LIMIT_KEYS = ("requests", "tokens", "window", "key")
ON_LIMIT = ("queue", "reject")


def flow_control(document: Mapping[str, JsonValue], checks: Checks) -> FlowControl:
    """What a definition says of when its executions start; mistakes go to `checks`."""
    return FlowControl(
        _concurrency(document, checks), _rate_limit(document, checks), _cache(document, checks)
    )


def _concurrency(document: Mapping[str, JsonValue], checks: Checks) -> Concurrency | None:
    found = _object(document, "concurrency", CONCURRENCY_KEYS, "{limit: 10}", checks)
    if found is None:
        return None
    limit = _count(found, "limit", ("concurrency",), checks)
    on_limit = found.get("onLimit", ON_LIMIT[0])
    if on_limit not in ON_LIMIT:
        checks.note(("concurrency", "onLimit"), f"is one of {', '.join(ON_LIMIT)}")
    return Concurrency(limit, _key(found, ("concurrency",), checks), on_limit == "reject")


def _rate_limit(document: Mapping[str, JsonValue], checks: Checks) -> RateLimit | None:
    found = _object(document, "rateLimit", RATE_LIMIT_KEYS, "{requests: 100, window: 60s}", checks)
    if found is None:
        return None
    if "window" not in found:
        checks.note(("rateLimit", "window"), 'is required: a duration, such as "60s"')
    window_ms = checks.duration(found, "window", ("rateLimit",)) or 1
    at = ("rateLimit",)
    requests = tokens = None
    if "requests" in found or "tokens" not in found:
        requests = _count(found, "requests", at, checks)
    if "tokens" in found:
        tokens = _count(found, "tokens", at, checks, TOKENS_MAX)
    return RateLimit(requests, window_ms, _key(found, at, checks), tokens)


def expecting(flow: FlowControl, steps: Sequence[Step]) -> FlowControl:
    """The flow control, knowing what one execution of these steps may write.

    Each model step counts once, with its `max_tokens`: how often it runs is not known before.
    """
    rate = flow.rate_limit
    if rate is None or rate.tokens is None:
        return flow
    settings = [
        step.setting("max_tokens")
        for step in every_step(steps)
        if step.type == GENERATE and not step.blocks
    ]
    written = sum(found if type(found) is int else MAX_TOKENS_DEFAULT for found in settings)
    expected = min(max(1, written), rate.tokens)
    return replace(flow, rate_limit=replace(rate, tokens_expected=expected))


def _cache(document: Mapping[str, JsonValue], checks: Checks) -> int | None:
    found = _object(document, "cache", ("ttl",), "{ttl: 300s}", checks)
    if found is None:
        return None
    if "ttl" not in found:
        checks.note(("cache", "ttl"), 'is required: a duration, such as "300s"')
    return checks.duration(found, "ttl", ("cache",))


def _object(
    document: Mapping[str, JsonValue],
    name: str,
    keys: tuple[str, ...],
    example: str,
    checks: Checks,
) -> Mapping[str, JsonValue] | None:
    if name not in document:
        return None
    found = document[name]
    if not isinstance(found, Mapping):
        checks.note((name,), f"is an object, such as {example}")
        return None
    checks.refuse_unknown(found, (name,), keys)
    return found


def _count(
    found: Mapping[str, JsonValue], key: str, loc: Loc, checks: Checks, most: int = LIMIT_MAX
) -> int:
    value = found.get(key)
    if type(value) is int and 1 <= value <= most:
        return value
    checks.note((*loc, key), f"is required: a number from 1 to {most}")
    return 1


def _key(found: Mapping[str, JsonValue], loc: Loc, checks: Checks) -> str | None:
    if "key" not in found:
        return None
    key = found["key"]
    if not isinstance(key, str):
        checks.note((*loc, "key"), "is one CEL expression as text, without braces")
        return None
    # Placed in a list of its own, it sees no step.
    checks.expression(key, (*loc, "key"), Place(Level((*loc, "key")), None))
    return key

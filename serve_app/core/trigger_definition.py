"""The `triggers` and `cancelOn` of a definition.

Owns their form. Carries nothing out. Invariant: a condition mentions only what is there when it is
evaluated, which is before any step has run.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from serve_app.core.app_events import event_name_problem
from serve_app.core.definition_checks import Checks
from serve_app.core.inference import JsonValue
from serve_app.core.step_graph import Level, Place
from serve_app.core.template import Loc, outline
from serve_app.core.triggers import (
    WILDCARD,
    CancelOn,
    CatchUp,
    CronTrigger,
    EventTrigger,
    HookScheme,
    HookTrigger,
    Trigger,
)

TRIGGERS_MAX = 20  # each is asked for every event of the workspace
CANCEL_ON_MAX = 10  # each is a subscription of every execution
EVENT_KEYS = ("event", "if")
HOOK_KEYS = ("webhook", "if")
CRON_KEYS = ("cron", "timezone", "catchUp")
_HIDDEN = frozenset({"input", "steps", "execution", "item", "index"})


def triggers(document: Mapping[str, JsonValue], checks: Checks) -> tuple[Trigger, ...]:
    """What starts the workflow by itself; mistakes go to `checks`."""
    found: list[Trigger] = []
    for value, loc in _objects(
        document, "triggers", TRIGGERS_MAX, "{event: app/ticket.created}", checks
    ):
        kinds = [kind for kind in _KINDS if kind in value]
        if len(kinds) == 1:
            found.append(_KINDS[kinds[0]](value, loc, checks))
        else:
            checks.note(loc, f"needs one key of {', '.join(_KINDS)} to name its kind")
    return tuple(found)


def _event(value: Mapping[str, JsonValue], loc: Loc, checks: Checks) -> EventTrigger:
    checks.refuse_unknown(value, loc, EVENT_KEYS)
    name = value.get("event")
    problem = None if name == WILDCARD else _pattern_problem(name)
    if problem is not None:
        checks.note((*loc, "event"), f"{problem}; `*` may end it")
    return EventTrigger(str(name), _condition(value, loc, _HIDDEN, checks))


def _cron(value: Mapping[str, JsonValue], loc: Loc, checks: Checks) -> CronTrigger:
    checks.refuse_unknown(value, loc, CRON_KEYS)
    cron, timezone = value.get("cron"), value.get("timezone", "UTC")
    catch_up = value.get("catchUp", CatchUp.LATEST.value)
    if not isinstance(cron, str) or not isinstance(timezone, str):
        checks.note((*loc, "cron"), 'is text such as "0 9 * * 1-5"; timezone: Europe/Berlin')
    elif (problem := checks.schedule(cron, timezone)) is not None:
        member, message = problem
        checks.note((*loc, member), message)
    if catch_up not in tuple(CatchUp):
        checks.note((*loc, "catchUp"), f"is one of {', '.join(CatchUp)}")
        catch_up = CatchUp.LATEST.value
    return CronTrigger(str(cron), str(timezone), CatchUp(str(catch_up)))


def _hook(value: Mapping[str, JsonValue], loc: Loc, checks: Checks) -> HookTrigger:
    checks.refuse_unknown(value, loc, HOOK_KEYS)
    scheme = value.get("webhook")
    if scheme not in tuple(HookScheme):
        checks.note((*loc, "webhook"), f"is one of {', '.join(HookScheme)}")
        scheme = HookScheme.STANDARD.value
    return HookTrigger(HookScheme(str(scheme)), _condition(value, loc, _HIDDEN, checks))


def cancel_on(document: Mapping[str, JsonValue], checks: Checks) -> tuple[CancelOn, ...]:
    """Which events cancel an execution; mistakes go to `checks`."""
    found = []
    for value, loc in _objects(
        document, "cancelOn", CANCEL_ON_MAX, "{event: app/ticket.closed}", checks
    ):
        checks.refuse_unknown(value, loc, EVENT_KEYS)
        name = value.get("event")
        problem = event_name_problem(name)
        if problem is not None:
            checks.note((*loc, "event"), problem)
        condition = _condition(value, loc, _HIDDEN - {"input", "execution"}, checks)
        found.append(CancelOn(str(name), condition))
    return tuple(found)


def _pattern_problem(name: JsonValue) -> str | None:
    is_pattern = isinstance(name, str) and name.endswith(WILDCARD)
    return event_name_problem(
        name[: -len(WILDCARD)] if is_pattern and isinstance(name, str) else name
    )


def _objects(
    document: Mapping[str, JsonValue], key: str, count_max: int, example: str, checks: Checks
) -> list[tuple[Mapping[str, JsonValue], Loc]]:
    found = document.get(key, [])
    if not isinstance(found, list) or len(found) > count_max:
        checks.note((key,), f"is a list of at most {count_max}, such as [{example}]")
        return []
    objects: list[tuple[Mapping[str, JsonValue], Loc]] = []
    for index, value in enumerate(found):
        if isinstance(value, Mapping):
            objects.append((value, (key, index)))
        else:
            checks.note((key, index), f"is an object, such as {example}")
    return objects


def _condition(
    value: Mapping[str, JsonValue], loc: Loc, hidden: frozenset[str], checks: Checks
) -> str | None:
    if "if" not in value:
        return None
    condition, loc = value["if"], (*loc, "if")
    if not isinstance(condition, str):
        checks.note(loc, "is one CEL expression as text, without braces")
        return None
    known_count = len(checks.mentions)
    # Placed in a list of its own, it sees no step.
    checks.expression(condition, loc, Place(Level(loc), None))
    if len(checks.mentions) > known_count:
        names = {reference.path[0] for reference in outline(condition).references}
        unseen = sorted(hidden.intersection(map(str, names)))
        if unseen:
            checks.mentions.pop()  # one problem is enough
            checks.note(loc, f"{', '.join(unseen)} cannot be seen here; event can")
    return condition


_KINDS: Mapping[str, Callable[[Mapping[str, JsonValue], Loc, Checks], Trigger]] = MappingProxyType(
    {"event": _event, "cron": _cron, "webhook": _hook}
)

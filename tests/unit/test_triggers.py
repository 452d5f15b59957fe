"""Triggers of a definition: what is refused with which place, and what an event starts."""

import pytest

from serve_app.core.app_events import EVENT_NAME_MAX, AppEvent, event_message, event_name_problem
from serve_app.core.errors import InvalidWorkflowError
from serve_app.core.hooks import hook_event_name
from serve_app.core.trigger_definition import CANCEL_ON_MAX, TRIGGERS_MAX
from serve_app.core.triggers import (
    CancelOn,
    EventTrigger,
    HookScheme,
    HookTrigger,
    is_started_by,
    started_by_event,
)
from tests.support.definitions import EXPRESSIONS, parsed

STEPS = "[{id: a, echo: {}}]"


def locs_of(**members: object) -> list[tuple[str | int, ...]]:
    with pytest.raises(InvalidWorkflowError) as refused:
        parsed(STEPS, **members)
    return [problem.loc for problem in refused.value.problems]


@pytest.mark.parametrize(
    ("triggers", "loc"),
    [
        ({}, ("triggers",)),
        ([{"event": "a"}] * (TRIGGERS_MAX + 1), ("triggers",)),
        (["a"], ("triggers", 0)),
        ([{"event": "a"}, {}], ("triggers", 1)),
        ([{"event": ""}], ("triggers", 0, "event")),
        ([{"event": 3}], ("triggers", 0, "event")),
        ([{"event": "a b"}], ("triggers", 0, "event")),
        ([{"event": "a\n"}], ("triggers", 0, "event")),
        ([{"event": "a*b"}], ("triggers", 0, "event")),
        ([{"event": "**"}], ("triggers", 0, "event")),
        ([{"event": "x" * (EVENT_NAME_MAX + 1)}], ("triggers", 0, "event")),
        ([{"event": "inngest/failed"}], ("triggers", 0, "event")),
        ([{"event": "inferpipe/hook.w"}], ("triggers", 0, "event")),
        ([{"webhook": "stripe"}], ("triggers", 0, "webhook")),
        ([{"webhook": True}], ("triggers", 0, "webhook")),
        ([{"webhook": "github", "secret": "x"}], ("triggers", 0, "secret")),
        ([{"webhook": "github", "if": "input.x"}], ("triggers", 0, "if")),
        ([{"event": "a", "when": "true"}], ("triggers", 0, "when")),
        ([{"event": "a", "if": True}], ("triggers", 0, "if")),
        ([{"event": "a", "if": "1 +"}], ("triggers", 0, "if")),
        ([{"event": "a", "if": "input.x == 1"}], ("triggers", 0, "if")),
        ([{"event": "a", "if": "steps.a.output"}], ("triggers", 0, "if")),
        ([{"event": "a", "if": "execution.id == ''"}], ("triggers", 0, "if")),
        ([{"event": "a", "if": "item > 1"}], ("triggers", 0, "if")),
        ([{"event": "a", "if": f"'{'x' * 5000}' == ''"}], ("triggers", 0, "if")),
    ],
)
def test_a_wrong_trigger_is_one_problem_with_its_place(
    triggers: object, loc: tuple[str | int, ...]
) -> None:
    assert locs_of(triggers=triggers) == [loc]


@pytest.mark.parametrize(
    ("cancel_on", "loc"),
    [
        ({"event": "a"}, ("cancelOn",)),
        ([{"event": "a"}] * (CANCEL_ON_MAX + 1), ("cancelOn",)),
        ([{"event": "a/*"}], ("cancelOn", 0, "event")),
        ([{"event": "a", "if": "steps.a.output"}], ("cancelOn", 0, "if")),
        ([{"event": "a", "timeout": "1h"}], ("cancelOn", 0, "timeout")),
    ],
)
def test_a_wrong_cancel_is_one_problem_with_its_place(
    cancel_on: object, loc: tuple[str | int, ...]
) -> None:
    assert locs_of(cancelOn=cancel_on) == [loc]


def test_what_is_right_is_read() -> None:
    workflow = parsed(
        STEPS,
        triggers=[{"event": "app/*"}, {"event": "*"}, {"event": "b", "if": "event.data.n > 2"}],
        cancelOn=[{"event": "c", "if": "event.data.id == input.id"}, {"event": "c"}],
    )
    assert workflow.triggers == (
        EventTrigger("app/*"),
        EventTrigger("*"),
        EventTrigger("b", "event.data.n > 2"),
    )
    assert workflow.cancel_on == (CancelOn("c", "event.data.id == input.id"), CancelOn("c"))
    assert workflow.cancel_names == ("c",)
    assert parsed(STEPS, triggers=[], cancelOn=[]).triggers == ()


@pytest.mark.parametrize(
    ("pattern", "condition", "is_started"),
    [
        ("app/ticket.created", None, True),
        ("app/ticket", None, False),
        ("APP/ticket.created", None, False),
        ("app/*", None, True),
        ("app/ticket.created*", None, True),
        ("app/ticket.created.*", None, False),
        ("*", None, True),
        ("*", "event.data.priority > 2", True),
        ("*", "event.data.priority > 3", False),
        ("*", "event.name.startsWith('app/') && event.id == 'e1' && event.ts == 5", True),
        ("*", "event.data.nothing == 1", False),  # no value is no match
        ("*", "event.data.priority", False),  # nor is a number
        ("*", "event.data.text.matches('(x+x+)+y')", False),
    ],
)
def test_which_trigger_takes_an_event(
    pattern: str, condition: str | None, *, is_started: bool
) -> None:
    event = AppEvent("w", "app/ticket.created", "e1", {"priority": 3, "text": "x" * 1000}, 5)
    trigger = EventTrigger(pattern, condition)
    assert is_started_by("w", (trigger,), event.shown(), EXPRESSIONS.evaluate) is is_started
    never = EventTrigger("other")
    assert is_started_by("w", (never, trigger), event.shown(), EXPRESSIONS.evaluate) is is_started


def test_ids_are_derived_from_what_makes_them() -> None:
    one = started_by_event(16, "w", "e1", "flow")
    assert one == started_by_event(16, "w", "e1", "flow")
    others = [("v", "e1", "flow"), ("w", "e2", "flow"), ("w", "e1", "wolf"), ("w", "e1f", "low")]
    assert len({one, *(started_by_event(16, *other) for other in others)}) == 5


def test_a_topic_has_one_place_and_its_messages_tell_repeats() -> None:
    first = event_message(AppEvent("w", "n", "e1", {"a": 1}, 1), 16)
    again = event_message(AppEvent("w", "n", "e1", {"a": 2}, 9), 16)
    assert (first.message_id, first.target_partition) == (again.message_id, again.target_partition)
    assert event_message(AppEvent("v", "n", "e1", {}, 1), 16).message_id != first.message_id
    places = {
        event_message(AppEvent("w", str(n), "e", {}, 1), 16).target_partition for n in range(99)
    }
    assert places == set(range(16))


def test_a_hooks_event_is_its_own_workflows_alone() -> None:
    event = AppEvent("w", hook_event_name("mine"), "e1", {"n": 1}, 5).shown()
    hook, every = HookTrigger(HookScheme.GITHUB, "event.data.n == 1"), EventTrigger("*")
    assert is_started_by("mine", (hook,), event, EXPRESSIONS.evaluate)
    assert not is_started_by("other", (hook, every), event, EXPRESSIONS.evaluate)
    assert not is_started_by("mine", (every,), event, EXPRESSIONS.evaluate)


@pytest.mark.parametrize("name", ["a", "app/ticket.created", "ä:b{c}", "x" * EVENT_NAME_MAX])
def test_a_name_may_be(name: str) -> None:
    assert event_name_problem(name) is None

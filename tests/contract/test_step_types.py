"""What every step type owes: a fixture here, mistakes with their place, and an output.

A new type is one file in `steps/`, one line in the registry and one `Fixture` below.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pytest

from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.system import SystemClock
from serve_app.core.execution import Wait, WaitKind
from serve_app.core.inference import JsonValue, Usage
from serve_app.core.template import Loc
from serve_app.ports import HttpAnswer, HttpRequest, StepCall, StepType
from serve_app.services.inference import Inference
from serve_app.steps import step_types
from tests.support.api import ScriptedPlane
from tests.support.workflows import CREATED, T0, ToyEntropy

NOW_MS = T0 + 5_000


@dataclass
class Fixture:
    """One step type's examples.

    Args:
        good: settings as an author writes them, expressions included.
        bad: settings that are refused, each with the place of its first mistake.
        filled: settings with their values, and what the step gives: its output, or its wait.
    """

    good: list[JsonValue]
    bad: list[tuple[JsonValue, Loc]]
    filled: JsonValue
    gives: object
    input: JsonValue = None


FIXTURES = {
    "echo": Fixture(
        good=[{}, {"a": "{{ input }}"}],
        bad=[(3, ()), ([], ()), ("text", ())],
        filled={"a": 1},
        gives={"a": 1},
    ),
    "transform": Fixture(
        good=["{{ input }}", {"a": ["{{ input }}"]}],
        bad=[({}, ()), ("text", ()), (3, ())],
        filled=[1, 2],
        gives=[1, 2],
    ),
    "generate": Fixture(
        good=[{"prompt": "{{ input }}"}, {"messages": "{{ input }}", "max_tokens": 5}],
        bad=[
            ({}, ()),
            ({"prompt": "x", "messages": []}, ()),
            ({"prompt": "x", "maxTokens": 5}, ("maxTokens",)),
            ({"prompt": "x", "temperature": 9}, ("temperature",)),
        ],
        filled={"prompt": "Hi"},
        gives="three small tokens",
    ),
    "sleep": Fixture(
        good=["30s", 500, "{{ input }}", {"until": "2027-01-31T08:00:00Z"}, {"until": "{{ 1 }}"}],
        bad=[
            ("soon", ()),
            (0, ()),
            (None, ()),
            ({}, ("until",)),
            ({"until": "2027-01-31T08:00:00"}, ("until",)),
            ({"until": 1, "for": 2}, ("for",)),
        ],
        filled="2s",
        gives=Wait(WaitKind.TIME, NOW_MS + 2_000),
    ),
    "approval": Fixture(
        good=[{"message": "Ship {{ input }}?", "timeout": "2d"}],
        bad=[
            ("Ship?", ()),
            ({"timeout": "2d"}, ("message",)),
            ({"message": "", "timeout": "2d"}, ("message",)),
            ({"message": "?", "timeout": "never"}, ("timeout",)),
            ({"message": "?", "timeout": "2d", "by": "me"}, ("by",)),
        ],
        filled={"message": "Ship it?", "timeout": 1000},
        gives=Wait(WaitKind.APPROVAL, NOW_MS + 1_000, message="Ship it?"),
    ),
    "wait_for_event": Fixture(
        good=[{"event": "a/b", "timeout": "1h"}, {"event": "a/b", "timeout": "1h", "if": "true"}],
        bad=[
            ("a/b", ()),
            ({"event": "a/b"}, ("timeout",)),
            ({"event": 3, "timeout": "1h"}, ("event",)),
            ({"event": "a/b", "timeout": 0}, ("timeout",)),
        ],
        filled={"event": "a/b", "timeout": "1s"},
        gives=Wait(WaitKind.EVENT, NOW_MS + 1_000, event="a/b"),
    ),
    "http": Fixture(
        good=[
            {"method": "GET", "url": "https://example.com/{{ input }}"},
            {"method": "POST", "url": "{{ input }}", "json": {"a": "{{ input }}"}, "timeout": "5s"},
            {"method": "PUT", "url": "https://example.com", "body": "x", "headers": {"A": "b"}},
        ],
        bad=[
            ("https://example.com", ()),
            ({"url": "https://example.com"}, ("method",)),
            ({"method": "GET"}, ("url",)),
            ({"method": "FETCH", "url": "https://example.com"}, ("method",)),
            ({"method": "GET", "url": "ftp://example.com"}, ("url",)),
            ({"method": "GET", "url": "https://a@example.com"}, ("url",)),
            ({"method": "GET", "url": "https://e.com", "headers": {"a": 1}}, ("headers", "a")),
            ({"method": "GET", "url": "https://example.com", "json": 1, "body": ""}, ("body",)),
            ({"method": "GET", "url": "https://example.com", "timeout": "x"}, ("timeout",)),
            ({"method": "GET", "url": "https://example.com", "retries": 1}, ("retries",)),
        ],
        filled={"method": "POST", "url": "https://e.com/?a=1", "query": {"q": "x y"}, "json": [1]},
        gives={
            "status": 200,
            "headers": {"content-type": "application/json"},
            "body": {"method": "POST", "url": "https://e.com/?a=1&q=x+y", "body": "[1]"},
        },
    ),
    "workflow": Fixture(
        good=[{"id": "other", "input": {}}, {"id": "{{ input }}", "input": "{{ input }}"}],
        bad=[("other", ()), ({"id": "other"}, ("input",)), ({"id": 3, "input": 1}, ("id",))],
        filled={"id": "other", "input": {"n": 1}},
        gives=None,
    ),
    "publish": Fixture(
        good=[{"progress": 40}, {"progress": "{{ input }}", "message": "{{ input }}"}],
        bad=[
            (40, ()),
            ({"message": "x"}, ("progress",)),
            ({"progress": 101}, ("progress",)),
            ({"progress": True}, ("progress",)),
            ({"progress": 1, "message": 3}, ("message",)),
        ],
        filled={"progress": 40, "message": "almost"},
        gives=None,
    ),
    "emit": Fixture(
        good=[{"name": "a/b"}, {"name": "a/{{ input }}", "data": "{{ input }}"}],
        bad=[("a/b", ()), ({"data": 1}, ("name",)), ({"name": "*"}, ("name",))],
        filled={"name": "a/b", "data": 1},
        gives={"id": "evt_" + hashlib.sha256(b"exe_00test/s/1").hexdigest()[:32]},
    ),
}  # fmt: skip


class Beginning:
    """Starts children by doing nothing."""

    async def start(self, call: StepCall, workflow_id: str, value: JsonValue) -> None:
        assert (workflow_id, value) == ("other", {"n": 1})


class Echoing:
    """An HTTP client to a server that answers with the request."""

    async def request(self, request: HttpRequest) -> HttpAnswer:
        said = {"method": request.method, "url": request.url, "body": request.body.decode()}
        headers = {"content-type": "application/json"}
        return HttpAnswer(200, headers, json.dumps(said).encode(), is_cut=False)


def registered() -> dict[str, StepType]:
    plane = ScriptedPlane()
    inference = Inference(plane, plane, SystemClock(), resume_wait_s=1.0)
    types = step_types(inference, JsonSchemas(), ToyEntropy(), Echoing(), 1000, Beginning())
    return dict(types)


def a_call(fixture: Fixture, **members: Any) -> StepCall:
    given: dict[str, Any] = {
        "execution_id": "exe_00test",
        "step_id": "s",
        "attempt": 1,
        "settings": fixture.filled,
        "input": fixture.input,
        "idempotency_key": "exe_00test/s/1",
        "deadline_ms": None,
        "priority": 0,
        "emit": lambda text, ids: None,
        "report_usage": lambda usage: None,
        "created": CREATED,
    }
    return StepCall(**{**given, **members})


def test_every_registered_type_has_a_fixture_and_no_other() -> None:
    assert set(FIXTURES) == set(registered())


@pytest.mark.parametrize("name", FIXTURES)
def test_a_type_runs_in_exactly_one_way(name: str) -> None:
    kind = registered()[name]
    ways = [way for way in (kind.compute, kind.run, kind.wait) if way is not None]
    assert len(ways) == 1


@pytest.mark.parametrize(
    ("name", "settings"), [(name, good) for name, f in FIXTURES.items() for good in f.good]
)
def test_good_settings_have_no_problem(name: str, settings: JsonValue) -> None:
    assert list(registered()[name].check(settings)) == []


@pytest.mark.parametrize(
    ("name", "settings", "loc"),
    [(name, bad, loc) for name, f in FIXTURES.items() for bad, loc in f.bad],
)
def test_bad_settings_are_told_with_their_place(name: str, settings: JsonValue, loc: Loc) -> None:
    problems = list(registered()[name].check(settings))
    assert problems
    assert problems[0].loc == loc
    assert problems[0].msg


@pytest.mark.parametrize("name", FIXTURES)
async def test_a_type_gives_its_output(name: str) -> None:
    fixture, kind = FIXTURES[name], registered()[name]
    usage: list[Usage] = []
    call = a_call(fixture, report_usage=usage.append)
    if kind.compute is not None:
        assert kind.compute(call) == fixture.gives
    elif kind.wait is not None:
        assert kind.wait(call, NOW_MS) == fixture.gives
    else:
        assert kind.run is not None
        assert await kind.run(call) == fixture.gives

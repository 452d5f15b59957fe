from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import pytest
import yaml

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.core.definition import STEPS_MAX, parse_workflow
from serve_app.core.errors import InvalidWorkflowError, Problem
from serve_app.core.inference import JsonValue
from serve_app.core.plain_json import DOCUMENT_SIZE_MAX, NESTING_MAX
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.core.workflow import (
    Concurrency,
    FlowControl,
    RateLimit,
    Workflow,
    parse_duration_ms,
    ready_steps,
)

SHIPPED = sorted((Path(__file__).parents[2] / "workflows").glob("*.yaml"))
EXPRESSIONS, SCHEMAS = CelExpressions(), JsonSchemas()


def check_object(settings: JsonValue) -> Sequence[Problem]:
    return () if isinstance(settings, Mapping) else (Problem(("here",), "takes an object"),)


STEP_CHECKS = {"echo": check_object, "generate": check_object, "transform": lambda _: ()}


def parse(document: object) -> Workflow:
    return parse_workflow(
        document,
        check_expression=EXPRESSIONS.check,
        check_schema=SCHEMAS.check,
        step_checks=STEP_CHECKS,
    )


def problems_of(document: object) -> list[Problem]:
    with pytest.raises(InvalidWorkflowError) as caught:
        parse(document)
    return list(caught.value.problems)


def locs_of(document: object) -> list[tuple[str | int, ...]]:
    return [problem.loc for problem in problems_of(document)]


def workflow(**changes: object) -> dict[str, object]:
    return {"id": "w", "steps": [{"id": "a", "echo": {}}], **changes}


def chain(*steps: dict[str, object]) -> dict[str, object]:
    return workflow(steps=[{"echo": {}, **step} for step in steps])


TRIAGE = """
id: support-triage
description: Classify a ticket and draft an answer.
input:  {type: object, required: [text], properties: {text: {type: string, maxLength: 20000}}}
timeout: 120s
retry: {attempts: 2, backoff: fixed, maxDelay: 500ms}
version: 7
createdAt: 2026-01-01
steps:
  - id: classify
    generate: {messages: [{role: user, content: "Label this ticket: {{ input.text }}"}]}
  - id: lookup
    when: "steps.classify.output.label == 'bug'"
    echo: {q: "{{ input.text }}"}
    retry: {attempts: 5}
    timeout: 1500
  - id: draft
    needs: [classify]
    generate: {prompt: "Answer kindly: {{ input.text }}", max_tokens: 200}
output: {label: "{{ steps.classify.output.label }}", answer: "{{ steps['draft'].output }}"}
"""


def test_a_definition_becomes_a_value() -> None:
    document = yaml.safe_load(TRIAGE.replace("createdAt: 2026-01-01", 'createdAt: "2026-01-01"'))
    found = parse(document)
    assert found.id == "support-triage"
    assert found.timeout_ms == 120_000
    assert found.retry == RetryPolicy(2, Backoff.FIXED, 500)
    assert [step.needs for step in found.steps] == [(), ("classify",), ("classify",)]
    lookup = found.step("lookup")
    assert (lookup.type, lookup.timeout_ms) == ("echo", 1_500)
    assert lookup.when == "steps.classify.output.label == 'bug'"
    assert lookup.retry == RetryPolicy(attempts=5)
    assert found.has_output
    assert set(document) - set(found.document) == {"version", "createdAt"}
    assert parse(found.document) == found


@pytest.mark.parametrize(
    ("changes", "output", "has_output"),
    [({}, None, False), ({"output": None}, None, True), ({"output": "x"}, "x", True)],
)
def test_an_explicit_null_output_is_an_output(
    changes: dict[str, object], output: object, has_output: bool
) -> None:
    found = parse(workflow(**changes))
    assert (found.output, found.has_output) == (output, has_output)


def test_an_unknown_step_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        parse(workflow()).step("b")


@pytest.mark.parametrize(
    ("document", "loc"),
    [
        ([], ()),
        (None, ()),
        ("id: w", ()),
        ({"steps": [{"id": "a", "echo": {}}]}, ("id",)),
        (workflow(id=""), ("id",)),
        (workflow(id="A"), ("id",)),
        (workflow(id="-a"), ("id",)),
        (workflow(id="a" * 65), ("id",)),
        (workflow(id="a\n"), ("id",)),
        (workflow(id=3), ("id",)),
        (workflow(description=3), ("description",)),
        (workflow(stepz=[]), ("stepz",)),
        (workflow(concurrency=3), ("concurrency",)),
        (workflow(concurrency={}), ("concurrency", "limit")),
        (workflow(concurrency={"limit": 0}), ("concurrency", "limit")),
        (workflow(concurrency={"limit": True}), ("concurrency", "limit")),
        (workflow(concurrency={"limit": 1, "onLimit": "wait"}), ("concurrency", "onLimit")),
        (workflow(concurrency={"limit": 1, "max": 2}), ("concurrency", "max")),
        (workflow(concurrency={"limit": 1, "key": "1 +"}), ("concurrency", "key")),
        (workflow(concurrency={"limit": 1, "key": "steps.a.output"}), ("concurrency", "key")),
        (workflow(concurrency={"limit": 1, "key": 3}), ("concurrency", "key")),
        (workflow(rateLimit=[]), ("rateLimit",)),
        (workflow(rateLimit={"requests": 1}), ("rateLimit", "window")),
        (workflow(rateLimit={"requests": 1, "window": "x"}), ("rateLimit", "window")),
        (workflow(rateLimit={"window": "1s"}), ("rateLimit", "requests")),
        (workflow(cache={}), ("cache", "ttl")),
        (workflow(cache={"ttl": 0}), ("cache", "ttl")),
        (workflow(input=3), ("input",)),
        (workflow(input={"type": "objct"}), ("input",)),
        (workflow(timeout=0), ("timeout",)),
        (workflow(timeout="soon"), ("timeout",)),
        (workflow(retry=3), ("retry",)),
        (workflow(retry={}), ("retry", "attempts")),
        (workflow(retry={"attempts": True}), ("retry", "attempts")),
        (workflow(retry={"attempts": -1}), ("retry", "attempts")),
        (workflow(retry={"attempts": 101}), ("retry", "attempts")),
        (workflow(retry={"attempts": 1, "backoff": "linear"}), ("retry", "backoff")),
        (workflow(retry={"attempts": 1, "backoff": []}), ("retry", "backoff")),
        (workflow(retry={"attempts": 1, "maxDelay": "1w"}), ("retry", "maxDelay")),
        (workflow(retry={"attempts": 1, "delay": 1}), ("retry", "delay")),
        (workflow(steps=None), ("steps",)),
        (workflow(steps=[]), ("steps",)),
        (workflow(steps={"a": {"echo": {}}}), ("steps",)),
        (workflow(steps=["a"]), ("steps", 0)),
        (workflow(steps=[{"id": "a"}]), ("steps", 0)),
        (workflow(steps=[{"id": "a", "echo": {}, "generate": {}}]), ("steps", 0)),
        (workflow(steps=[{"id": "a", "ecoh": {}}]), ("steps", 0, "ecoh")),
        (workflow(steps=[{"id": "a", "http": {}}]), ("steps", 0, "http")),
        (workflow(steps=[{"id": "a-b", "echo": {}}]), ("steps", 0, "id")),
        (workflow(steps=[{"echo": {}}]), ("steps", 0, "id")),
        (workflow(steps=[{"id": "a", "echo": 3}]), ("steps", 0, "echo", "here")),
        (chain({"id": "a", "x": 1}), ("steps", 0, "x")),
        (chain({"id": "a", "when": True}), ("steps", 0, "when")),
        (chain({"id": "a", "when": "1 +"}), ("steps", 0, "when")),
        (chain({"id": "a", "when": "inptu.x"}), ("steps", 0, "when")),
        (chain({"id": "a", "timeout": "0.1ms"}), ("steps", 0, "timeout")),
        (chain({"id": "a", "retry": {"attempts": "2"}}), ("steps", 0, "retry", "attempts")),
        (chain({"id": "a"}, {"id": "a"}), ("steps", 1, "id")),
        (chain({"id": "a", "needs": "b"}), ("steps", 0, "needs")),
        (chain({"id": "a", "needs": ["b"]}), ("steps", 0, "needs")),
        (chain({"id": "a", "needs": ["a"]}), ("steps", 0, "needs")),
        (chain({"id": "a"}, {"id": "b", "needs": ["a", "a"]}), ("steps", 1, "needs")),
        (chain({"id": "a", "needs": ["b"]}, {"id": "b"}), ("steps", 0, "needs")),
        (chain({"id": "a", "echo": {"x": ["{{ 1 + }}"]}}), ("steps", 0, "echo", "x", 0)),
        (chain({"id": "a", "echo": {"x": "{{ 1"}}), ("steps", 0, "echo", "x")),
        (chain({"id": "a", "echo": {"x": "{{ steps.b.output }}"}}), ("steps", 0, "echo", "x")),
        (chain({"id": "a", "when": "steps.a.output"}), ("steps", 0, "when")),
        (chain({"id": "a", "when": "steps['b'].output"}, {"id": "b"}), ("steps", 0, "when")),
        (
            chain({"id": "a"}, {"id": "b", "needs": [], "when": "steps.a.output"}),
            ("steps", 1, "when"),
        ),
        (chain({"id": "a", "when": "steps[input.x].output"}), ("steps", 0, "when")),
        (chain({"id": "a", "when": "item > 1"}), ("steps", 0, "when")),
        (workflow(output="{{ steps.b.output }}"), ("output",)),
        (workflow(output=["{{ }}"]), ("output", 0)),
        (workflow(x={3: 4}), ("x",)),
        (workflow(description=date(2026, 1, 1)), ("description",)),
        (workflow(description="\ud800"), ("description",)),
        (workflow(output=float("nan")), ("output",)),
        (workflow(output=2**63), ("output",)),
        (workflow(output=b"x"), ("output",)),
    ],
)
def test_each_mistake_is_one_problem_with_its_place(
    document: object, loc: tuple[str | int, ...]
) -> None:
    problems = problems_of(document)
    assert [problem.loc for problem in problems] == [loc]
    assert problems[0].msg


@pytest.mark.parametrize(
    "document",
    [
        chain({"id": "a"}, {"id": "b"}, {"id": "c", "when": "steps.a.output == 'steps.z'"}),
        chain({"id": "a"}, {"id": "b", "needs": []}, {"id": "c", "needs": ["a", "b"]}),
        chain({"id": "late", "needs": ["early"]}, {"id": "early", "needs": []}),
        chain({"id": "a", "when": "input.l.exists(item, item.steps.b == 1)"}),
        chain({"id": "a", "echo": {"steps.b": "steps.b {{ 'steps.b' }}"}}),
        workflow(input={}, timeout="1.5h", description="x", retry={"attempts": 0}),
        workflow(output={"x": "{{ execution.id }}{{ event.data }}"}),
    ],
)
def test_what_is_right_is_accepted(document: object) -> None:
    assert parse(document).steps


def test_all_problems_are_told_at_once() -> None:
    document = {
        "id": "W",
        "cache": {},
        "timeout": -1,
        "steps": [
            {"id": "a", "http": {}},
            {"id": "b", "echo": {"x": "{{ steps.zz.output }} {{ 1 + }}"}, "needs": ["q"]},
        ],
        "output": "{{",
    }
    assert set(locs_of(document)) == {
        ("cache", "ttl"),
        ("id",),
        ("timeout",),
        ("steps", 0, "http"),
        ("steps", 1, "echo", "x"),
        ("steps", 1, "needs"),
        ("output",),
    }


def test_flow_control_is_read() -> None:
    flow = parse(
        workflow(
            concurrency={"limit": 10, "key": "input.userId"},
            rateLimit={"requests": 100, "window": "60s"},
            cache={"ttl": "300s"},
        )
    ).flow
    assert flow == FlowControl(Concurrency(10, "input.userId"), RateLimit(100, 60_000), 300_000)


def test_messages_list_what_is_known() -> None:
    (problem,) = problems_of(workflow(steps=[{"id": "a", "ecoh": {}}]))
    assert "echo, generate, transform" in problem.msg


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_number_of_steps_is_bounded(extra: int) -> None:
    document = chain(*({"id": f"s{index}"} for index in range(STEPS_MAX + extra)))
    if extra <= 0:
        assert len(parse(document).steps) == STEPS_MAX + extra
    else:
        assert locs_of(document) == [("steps",)]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_nesting_is_bounded(extra: int) -> None:
    output: object = 1
    for _ in range(NESTING_MAX + extra - 1):
        output = [output]
    if extra <= 0:
        assert parse(workflow(output=output)).output
    else:
        assert len(locs_of(workflow(output=output))[0]) == NESTING_MAX + 1


def test_aliases_cannot_make_a_definition_huge() -> None:
    output: object = "x" * 100
    for _ in range(30):
        output = [output] * 10
    assert locs_of(workflow(output=output)) == [()]
    assert str(DOCUMENT_SIZE_MAX) in problems_of(workflow(output=output))[0].msg


def test_a_document_inside_itself_is_refused() -> None:
    document = workflow()
    document["output"] = document
    assert problems_of(document)


@pytest.mark.parametrize(
    ("value", "duration_ms"),
    [
        ("1ms", 1),
        ("30s", 30_000),
        ("1.5m", 90_000),
        ("2h", 7_200_000),
        ("366d", 366 * 86_400_000),
        ("0.5ms", None),
        ("366.1d", None),
        ("9" * 15 + "d", None),
        ("9" * 400 + "d", None),
        (1, 1),
        (0, None),
        (-1, None),
        (True, None),
        (1.0, None),
        ("", None),
        ("5", None),
        ("5 s", None),
        ("5s\n", None),
        ("-5s", None),
        ("٣s", None),
        ("1e3s", None),
        (None, None),
        ([], None),
    ],
)
def test_durations(value: object, duration_ms: int | None) -> None:
    if duration_ms is not None:
        assert parse_duration_ms(value) == duration_ms
    else:
        with pytest.raises(ValueError, match="duration"):
            parse_duration_ms(value)


def test_steps_become_ready_as_their_needs_are_done() -> None:
    found = parse(
        chain(
            {"id": "a"},
            {"id": "b", "needs": []},
            {"id": "c", "needs": ["a", "b"]},
            {"id": "d"},
        )
    )

    def ready(done: set[str], started: set[str]) -> list[str]:
        return [step.id for step in ready_steps(found.steps, done, started)]

    assert ready(set(), set()) == ["a", "b"]
    assert ready(set(), {"a"}) == ["b"]
    assert ready({"a"}, {"a", "b"}) == []
    assert ready({"a", "b"}, {"a", "b"}) == ["c"]
    assert ready({"a", "b", "c"}, {"a", "b", "c"}) == ["d"]


def test_there_are_shipped_workflows() -> None:
    assert {"test-echo", "chat-assistant", "sentiment-analysis", "data-extraction"} <= {
        path.stem for path in SHIPPED
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_workflows_parse(path: Path) -> None:
    found = parse(yaml.safe_load(path.read_text()))
    assert found.id == path.stem
    assert found.description
    assert found.input_schema is not None

"""Definitions and templates from anywhere: never an error of another kind, never a lost part."""

import contextlib
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.definition import parse_workflow
from serve_app.core.errors import InvalidWorkflowError, Problem
from serve_app.core.template import TemplateError, outline, render, split
from serve_app.core.workflow import Workflow, ready_steps

WORDS = ["id", "steps", "echo", "needs", "when", "retry", "output", "timeout", "input", "a", "b"]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["{{ x }}", "{{", "{{ steps.a.output }}", "{{ '}}' }}", "steps.b", "1s", "w", *WORDS]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
STEP_IDS = st.sampled_from(["a", "b", "c", "d", "a-b", ""])
STEPS = st.fixed_dictionaries(
    {},
    optional={
        "id": STEP_IDS | VALUES,
        "echo": VALUES,
        "needs": st.lists(STEP_IDS, max_size=3) | VALUES,
        "when": TEXTS | VALUES,
        "retry": st.fixed_dictionaries({}, optional={"attempts": VALUES, "maxDelay": VALUES}),
        "timeout": VALUES,
    },
)
WORKFLOWS = st.fixed_dictionaries(
    {"id": st.just("w") | VALUES, "steps": st.lists(STEPS, max_size=5) | VALUES},
    optional={"output": VALUES, "input": VALUES, "retry": VALUES, "timeout": VALUES, "x": VALUES},
)
SOUND_STEPS = st.lists(
    st.fixed_dictionaries(
        {"echo": st.just({})},
        optional={"needs": st.lists(st.sampled_from("abcde"), max_size=3, unique=True)},
    ),
    min_size=1,
    max_size=5,
)


def parse(document: object) -> Workflow:
    return parse_workflow(
        document,
        check_expression=lambda text: "odd" if len(text) % 2 else None,
        check_schema=lambda schema: None if isinstance(schema, Mapping) else "no",
        step_checks={"echo": lambda _: ()},
    )


@given(VALUES | WORKFLOWS)
def test_any_document_parses_or_is_refused_with_problems(document: object) -> None:
    problems: tuple[Problem, ...] | None = None
    try:
        found = parse(document)
        assert parse(found.document) == found
    except InvalidWorkflowError as error:
        problems = error.problems
    assert problems is None or (problems and all(problem.msg for problem in problems))


@given(SOUND_STEPS)
def test_every_accepted_workflow_can_be_run_to_its_end(steps: list[dict[str, object]]) -> None:
    named = [{"id": step_id, **step} for step_id, step in zip("abcde", steps, strict=False)]
    try:
        found = parse({"id": "w", "steps": named})
    except InvalidWorkflowError:
        return
    done: list[str] = []
    while ready := ready_steps(found.steps, done, done):
        assert all(set(step.needs) <= set(done) for step in ready)
        done += [step.id for step in ready]
    assert sorted(done) == sorted(step.id for step in found.steps)


@given(st.lists(st.tuples(st.booleans(), st.text("ab'\"{}\\ \n", max_size=8)), max_size=6))
def test_no_part_of_a_text_is_lost(parts: list[tuple[bool, str]]) -> None:
    text = "".join("{{" + part + "}}" if is_marked else part for is_marked, part in parts)
    with contextlib.suppress(TemplateError):
        pieces = split(text)
        plain = "".join(piece.text for piece in pieces if not piece.is_expression)
        assert all(piece.text and piece.text in text for piece in pieces)
        assert sum(map(text.count, "ab")) == sum(
            piece.text.count(letter) for piece in pieces for letter in "ab"
        )
        assert "{{" not in plain
        seen: list[str] = []
        render(text, lambda expression: seen.append(expression) or "")
        assert seen == [piece.text for piece in pieces if piece.is_expression]


@given(st.text("steps.ab[]'\"(){}, \\/rm", max_size=40))
def test_any_text_has_an_outline(text: str) -> None:
    found = outline(text)
    assert found.macro_depth <= len(found.macro_uses)


@given(st.text(max_size=30), st.sampled_from(["'", '"']))
def test_a_literal_hides_whatever_stands_in_it(content: str, quote: str) -> None:
    literal = quote + content.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote
    if "\n" in content:
        return
    assert outline(f"{literal} + steps.a").references[0].path == ("steps", "a")
    (piece,) = split("{{" + literal + "}}")
    assert piece.text == literal

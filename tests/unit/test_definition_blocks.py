"""Composites in a definition: their keys, their bounds, and what their inner steps may look at."""

import pytest

from serve_app.core.definition import NESTING_MAX, STEPS_MAX
from tests.unit.test_workflow import locs_of, parse, problems_of, workflow

Loc = tuple[str | int, ...]
AT: Loc = ("steps", 0)
E = {"echo": {}}


def step(step_id: str, **members: object) -> dict[str, object]:
    return {"id": step_id, **(members or E)}


def mapped(*steps: object, **members: object) -> dict[str, object]:
    return {"over": [1], "steps": list(steps) or [step("inner")], **members}


def loop(*steps: object, **members: object) -> dict[str, object]:
    return {"while": "true", "maxRounds": 3, "steps": list(steps) or [step("inner")], **members}


def see(expression: str) -> dict[str, object]:
    return step("see", transform=f"{{{{ {expression} }}}}")


@pytest.mark.parametrize(
    ("composite", "loc"),
    [
        ({"parallel": 3}, ()),
        ({"parallel": {}}, ("branches",)),
        ({"parallel": {"branches": {}}}, ("branches",)),
        ({"parallel": {"branches": {"a": []}}}, ("branches", "a")),
        ({"parallel": {"branches": {"a/b": [step("inner")]}}}, ("branches", "a/b")),
        ({"parallel": {"branches": {"a": [step("inner")]}, "x": 1}}, ("x",)),
        ({"map": {"over": [1]}}, ("steps",)),
        ({"map": mapped(over=3)}, ("over",)),
        ({"map": mapped(over="text")}, ("over",)),
        ({"map": mapped(over="{{ input }}{{ input }}")}, ("over",)),
        ({"map": mapped(over="{{ 1 + }}")}, ("over",)),
        ({"map": mapped(over="{{ item }}")}, ("over",)),
        ({"map": mapped(concurrency=0)}, ("concurrency",)),
        ({"map": mapped(concurrency=101)}, ("concurrency",)),
        ({"map": mapped(concurrency=True)}, ("concurrency",)),
        ({"map": mapped(onError="ignore")}, ("onError",)),
        ({"map": mapped(step("inner", transform="{{ steps.s.output }}"))},
         ("steps", 0, "transform")),
        ({"branch": {"cases": []}}, ("cases",)),
        ({"branch": {"cases": [3]}}, ("cases", 0)),
        ({"branch": {"cases": [{"steps": [step("inner")]}]}}, ("cases", 0, "when")),
        ({"branch": {"cases": [{"when": "true"}]}}, ("cases", 0, "steps")),
        ({"branch": {"cases": [{"when": "true", "steps": [step("i")]}], "else": {}}}, ("else",)),
        ({"loop": loop(maxRounds=0)}, ("maxRounds",)),
        ({"loop": loop(maxRounds="3")}, ("maxRounds",)),
        ({"loop": loop(**{"while": None})}, ("while",)),
        ({"loop": loop(**{"while": "steps.none.output"})}, ("while",)),
        ({"loop": loop(step("inner"), step("inner"))}, ("steps", 1, "id")),
        ({"loop": loop(step("inner", echo={}, needs=["s"]))}, ("steps", 0, "needs")),
        ({"loop": loop(step("inner", ecoh={}))}, ("steps", 0, "ecoh")),
    ],
)  # fmt: skip
def test_each_mistake_in_a_composite_is_one_problem_with_its_place(
    composite: dict[str, object], loc: Loc
) -> None:
    (kind,) = composite
    problems = problems_of(workflow(steps=[step("s", **composite)]))
    assert [problem.loc for problem in problems] == [(*AT, kind, *loc)]


@pytest.mark.parametrize("key", ["retry", "timeout"])
def test_a_composite_has_no_retry_and_no_limit_of_its_own(key: str) -> None:
    value: object = {"attempts": 1} if key == "retry" else "1s"
    document = workflow(steps=[step("s", map=mapped(), **{key: value})])
    assert locs_of(document) == [(*AT, key)]


@pytest.mark.parametrize(
    "steps",
    [
        [step("a"), step("s", map=mapped(see("steps.a.output + item + index")))],
        [step("a"), step("s", map=mapped(step("inner"), see("steps.inner.output")))],
        [step("s", loop=loop(see("steps.late.output"), step("late")))],
        [step("s", loop=loop(see("steps.see.output")))],
        [step("s", map=mapped(step("l", loop=loop(see("item"), **{"while": "item > 1"}))))],
        [step("s", map=mapped(step("t", map=mapped(see("item"), over="{{ item }}"))))],
    ],
)
def test_an_inner_step_sees_what_is_done_before_it(steps: list[object]) -> None:
    assert parse(workflow(steps=steps)).step("x/0/see").id == "see"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("s", map=mapped()), see("item")], "only in the steps of a map"),
        ([step("s", map=mapped()), see("steps.inner.output")], "inside another step"),
        ([step("s", map=mapped(see("steps.late.output"), step("late")))], "add it to needs"),
        (
            [step("s", parallel={"branches": {"l": [step("a")], "r": [see("steps.a.output")]}})],
            "inside another step",
        ),
        ([step("s", map=mapped(see("steps.z.output")))], "there is no step 'z'"),
    ],
)  # fmt: skip
def test_what_an_inner_step_cannot_see_is_said(steps: list[object], message: str) -> None:
    (problem,) = problems_of(workflow(steps=steps))
    assert message in problem.msg


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_inner_steps_count_as_steps(extra: int) -> None:
    inner = [step(f"s{index}") for index in range(STEPS_MAX + extra - 1)]
    document = workflow(steps=[step("all", map=mapped(*inner))])
    if extra <= 0:
        assert parse(document)
    else:
        (problem,) = problems_of(document)
        assert problem.loc == (*AT, "map", "steps")
        assert str(STEPS_MAX) in problem.msg


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_composites_nest_so_deep(extra: int) -> None:
    inner = step("leaf")
    for depth in range(NESTING_MAX + extra):
        inner = step(f"m{depth}", map=mapped(inner))
    if extra <= 0:
        assert parse(workflow(steps=[inner]))
    else:
        (problem,) = problems_of(workflow(steps=[inner]))
        assert f"at most {NESTING_MAX}" in problem.msg

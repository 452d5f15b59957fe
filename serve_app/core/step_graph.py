"""What must hold between the steps of a definition: ids, needs, and who may look at whom.

Owns the order of steps. Does not know their settings. Invariant: a definition without a problem
here has no circle, and every expression mentions only steps that are done when it is evaluated.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from serve_app.core.errors import Problem
from serve_app.core.template import Loc, outline

# By step in document order: its id ("" where it has none) and the ids it needs.
Needs: TypeAlias = Sequence[tuple[str, tuple[str, ...]]]

MAP_VARIABLES = frozenset({"item", "index"})
NAME_CHARS_MAX = 100  # of a foreign name in a message


@dataclass(frozen=True, slots=True)
class Mention:
    """An expression that parses, and the index of the step it stands in (None: `output`)."""

    loc: Loc
    text: str
    step_index: int | None


def graph_problems(steps: Needs, mentions: Sequence[Mention]) -> Iterator[Problem]:
    """Yield what is wrong between steps and in the expressions that look at other steps."""
    indexes: dict[str, int] = {}
    for index, (step_id, _) in enumerate(steps):
        if step_id in indexes:
            yield Problem(("steps", index, "id"), f"{step_id} is the id of an earlier step too")
        elif step_id:
            indexes[step_id] = index
    yield from _needs_problems(steps, indexes)
    ancestors = _ancestors(steps)
    for mention in mentions:
        before: Collection[str] = indexes
        if mention.step_index is not None:
            # A step without an id or in a circle has a problem already; its mentions add none.
            before = ancestors.get(steps[mention.step_index][0], indexes)
        for message in _reference_messages(mention.text, indexes, before):
            yield Problem(mention.loc, message)


def _needs_problems(steps: Needs, indexes: Mapping[str, int]) -> Iterator[Problem]:
    for index, (_, needs) in enumerate(steps):
        for need in needs:
            if need not in indexes:
                loc = ("steps", index, "needs")
                yield Problem(loc, f"there is no step {need[:NAME_CHARS_MAX]!r}")
    ancestors = _ancestors(steps)
    circle = [step_id for step_id in indexes if step_id not in ancestors]
    if circle:
        yield Problem(
            ("steps", indexes[circle[0]], "needs"),
            f"{', '.join(circle)} wait for each other; a step without needs of its own needs the "
            "one before it",
        )


def _ancestors(steps: Needs) -> dict[str, Collection[str]]:
    """For each step that is not behind a circle, all steps that are done when it starts."""
    known = {step_id for step_id, _ in steps}
    ancestors: dict[str, Collection[str]] = {}
    waiting = [(step_id, known.intersection(needs)) for step_id, needs in steps if step_id]
    while waiting:
        ready = [(step_id, needs) for step_id, needs in waiting if needs <= ancestors.keys()]
        if not ready:
            break
        for step_id, needs in ready:
            ancestors[step_id] = needs.union(*(ancestors[need] for need in needs))
        waiting = [(step_id, needs) for step_id, needs in waiting if step_id not in ancestors]
    return ancestors


def _reference_messages(
    text: str, step_ids: Collection[str], before: Collection[str]
) -> Iterator[str]:
    for reference in outline(text).references:
        name, *selected = reference.path
        if name in MAP_VARIABLES:
            yield f"{name} exists only inside a map, which this release does not run"
        if name != "steps":
            continue
        if not selected or not isinstance(selected[0], str):
            yield "steps is used as a whole: name the step, as in steps.first.output"
        elif selected[0] not in step_ids:
            yield f"there is no step {selected[0][:NAME_CHARS_MAX]!r}; steps: {', '.join(step_ids)}"
        elif selected[0] not in before:
            yield f"step {selected[0]} is not done before this one: add it to needs"

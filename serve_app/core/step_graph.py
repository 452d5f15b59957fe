"""What must hold between the steps of a definition: ids, needs, and who may look at whom.

Owns the order of steps and the scope of their names. Does not know their settings. Invariant: a
definition without a problem here has no circle, and every expression mentions only what is there
when it is evaluated.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.core.errors import Problem
from serve_app.core.template import Loc, outline
from serve_app.core.workflow import GENERATE

MAP_VARIABLES = frozenset({"item", "index"})
TOOL_VARIABLES = frozenset({"args"})
NAME_CHARS_MAX = 100  # of a foreign name in a message


@dataclass(eq=False, slots=True)
class Level:
    """One block of steps, as the checks see it.

    Args:
        loc: of the list.
        around: the composite it stands in; None: it is the workflow's own.
        kind: the composite's type; "" for the workflow's own.
        steps: in document order: id ("" where it has none) and the ids needed.
    """

    loc: Loc
    around: "Place | None" = None
    kind: str = ""
    steps: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """The ids of its steps."""
        return [step_id for step_id, _ in self.steps if step_id]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expression stands: in the step of this index; None: where all are done."""

    level: Level
    index: int | None


@dataclass(frozen=True, slots=True)
class Mention:
    """An expression that parses."""

    loc: Loc
    text: str
    place: Place


def graph_problems(levels: Sequence[Level], mentions: Sequence[Mention]) -> Iterator[Problem]:
    """Yield what is wrong between steps and in the expressions that look at other steps."""
    known: set[str] = set()
    for level in levels:
        for index, (step_id, _) in enumerate(level.steps):
            if step_id in known:
                message = f"{step_id} is the id of an earlier step too"
                yield Problem((*level.loc, index, "id"), message)
            elif step_id:
                known.add(step_id)
    ancestors = {level: _ancestors(level) for level in levels}
    for level in levels:
        yield from _needs_problems(level, ancestors[level])
    for mention in mentions:
        for message in _reference_messages(mention, known, ancestors):
            yield Problem(mention.loc, message)


def _needs_problems(level: Level, ancestors: Mapping[str, Collection[str]]) -> Iterator[Problem]:
    ids = level.ids
    for index, (_, needs) in enumerate(level.steps):
        for need in needs:
            if need not in ids:
                loc = (*level.loc, index, "needs")
                yield Problem(loc, f"there is no step {need[:NAME_CHARS_MAX]!r} in this list")
    circle = [step_id for step_id in dict.fromkeys(ids) if step_id not in ancestors]
    if circle:
        yield Problem(
            (*level.loc, ids.index(circle[0]), "needs"),
            f"{', '.join(circle)} wait for each other; a step without needs of its own needs the "
            "one before it",
        )


def _ancestors(level: Level) -> dict[str, Collection[str]]:
    """For each step that is not behind a circle, the steps of its level done when it starts."""
    known = {step_id for step_id, _ in level.steps}
    ancestors: dict[str, Collection[str]] = {}
    waiting = [(step_id, known.intersection(needs)) for step_id, needs in level.steps if step_id]
    while waiting:
        ready = [(step_id, needs) for step_id, needs in waiting if needs <= ancestors.keys()]
        if not ready:
            break
        for step_id, needs in ready:
            ancestors[step_id] = needs.union(*(ancestors[need] for need in needs))
        waiting = [(step_id, needs) for step_id, needs in waiting if step_id not in ancestors]
    return ancestors


def _around(place: Place) -> Iterator[Place]:
    """The place and those of the composites around it, innermost first."""
    at: Place | None = place
    while at is not None:
        yield at
        at = at.level.around


def _visible(
    place: Place, ancestors: Mapping[Level, Mapping[str, Collection[str]]]
) -> Iterator[str]:
    for at in _around(place):
        ids = at.level.ids
        if at.index is None or at.level.kind == "loop":
            yield from ids  # a round sees all of the one before it
        else:
            # A step without an id or in a circle has a problem already; its mentions add none.
            yield from ancestors[at.level].get(at.level.steps[at.index][0], ids)


def _reference_messages(
    mention: Mention,
    known: Collection[str],
    ancestors: Mapping[Level, Mapping[str, Collection[str]]],
) -> Iterator[str]:
    visible = set(_visible(mention.place, ancestors))
    kinds = {at.level.kind for at in _around(mention.place)}
    for reference in outline(mention.text).references:
        name, *selected = reference.path
        if name in MAP_VARIABLES and "map" not in kinds:
            yield f"{name} exists only in the steps of a map"
        if name in TOOL_VARIABLES and GENERATE not in kinds:
            yield f"{name} exists only in the step of a tool"
        if name != "steps":
            continue
        if not selected or not isinstance(selected[0], str):
            yield "steps is used as a whole: name the step, as in steps.first.output"
        elif selected[0] in visible:
            continue
        elif selected[0] not in known:
            seen = ", ".join(sorted(visible)) or "none yet"
            yield f"there is no step {selected[0][:NAME_CHARS_MAX]!r}; seen from here: {seen}"
        elif any(selected[0] in at.level.ids for at in _around(mention.place)):
            yield f"step {selected[0]} is not done before this one: add it to needs"
        else:
            yield f"step {selected[0]} is inside another step: only that one's output is seen here"

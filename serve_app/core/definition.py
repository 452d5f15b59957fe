"""From a document to a checked workflow.

Owns the format of a definition. Does not know CEL, JSON Schema or any step type but the composites,
whose settings hold steps: the caller hands in the other checks. Invariant: what `parse_workflow`
returns can be run as it stands: every expression parses, every step it mentions has finished when
it is evaluated, and no key was ignored.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from serve_app.core.definition_checks import Checks, CheckSchedule
from serve_app.core.errors import InvalidWorkflowError, Problem
from serve_app.core.flow_definition import expecting, flow_control
from serve_app.core.inference import JsonValue
from serve_app.core.plain_json import PROBLEMS_MAX, plain_document
from serve_app.core.retry import RetryPolicy
from serve_app.core.step_graph import Level, Place, graph_problems
from serve_app.core.template import OPEN, Loc, split
from serve_app.core.tool_definition import TOOL_SETTINGS, CheckSchema, ToolForms, is_with_tools
from serve_app.core.trigger_definition import cancel_on, triggers
from serve_app.core.workflow import COMPOSITES, Block, Step, Workflow

StepCheck: TypeAlias = Callable[[JsonValue], Sequence[Problem]]

STEPS_MAX = 100  # inner steps included
NESTING_MAX = 5  # composites inside each other
CONCURRENCY_MAX = 100  # items of a map at once
ROUNDS_MAX = 1_000  # of a loop
DESCRIPTION_CHARS_MAX = 2_000

WORKFLOW_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
STEP_ID = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # an identifier, so that CEL can select it
STEP_ID_FORM = "letters, digits and _, no digit first"
FLOW_KEYS = ("concurrency", "rateLimit", "cache")
TRIGGER_KEYS = ("triggers", "cancelOn")
WORKFLOW_KEYS = (
    *("id", "description", "input", *TRIGGER_KEYS, "timeout", "retry", *FLOW_KEYS),
    *("steps", "output"),
)
BODY_KEYS = ("retry", "timeout")
STEP_KEYS = ("id", "needs", "when", *BODY_KEYS)
ANSWER_KEYS = frozenset({"version", "createdAt"})  # GET adds them, so that PUT ignores them
STEP_TYPES_TO_COME = frozenset({"app"})
WAITS = ("sleep", "approval", "wait_for_event", "workflow")
COMPOSITE_KEYS: Mapping[str, tuple[str, ...]] = {
    "parallel": ("branches",),
    "map": ("over", "concurrency", "onError", "steps"),
    "branch": ("cases", "else"),
    "loop": ("while", "maxRounds", "steps"),
}
ON_ERROR = ("fail", "skip")


def parse_workflow(
    document: object,
    *,
    check_expression: Callable[[str], str | None],
    check_schema: Callable[[object], str | None],
    step_checks: Mapping[str, StepCheck],
    check_schedule: CheckSchedule | None = None,
) -> Workflow:
    """Check a definition and give it as a value.

    Args:
        document: what JSON or YAML gave; nothing is expected of it.
        check_expression: why a text is no expression, or None.
        check_schema: why a value is no JSON Schema, or None.
        step_checks: by step type; each gets settings whose templates parse.
        check_schedule: what is wrong with a cron text in a time zone, and why; None: there are no
            schedules.

    Raises:
        InvalidWorkflowError: with every problem found, each with its place.
    """
    if not isinstance(document, Mapping):
        raise _refusal([Problem((), "a workflow is an object with id and steps")])
    plain, problems = plain_document(document)
    if problems:
        raise _refusal(problems)
    definition = {key: value for key, value in plain.items() if key not in ANSWER_KEYS}
    checks = Checks(check_expression, check_schedule)
    return _Parsing(checks, check_schema, step_checks).workflow(definition)


def _refusal(problems: Sequence[Problem]) -> InvalidWorkflowError:
    first = problems[0]
    place = ".".join(str(part) for part in first.loc)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"invalid workflow: {place + ': ' if place else ''}{first.msg}{more}"
    return InvalidWorkflowError(message, problems[:PROBLEMS_MAX])


class _Parsing:
    """One pass over a plain document."""

    def __init__(
        self, checks: Checks, check_schema: CheckSchema, step_checks: Mapping[str, StepCheck]
    ) -> None:
        self._checks = checks
        self._check_schema = check_schema
        self._note = checks.note
        self._step_checks = step_checks
        self._types = (*step_checks, *COMPOSITES)
        self._levels: list[Level] = []
        self._steps_left = STEPS_MAX

    def workflow(self, document: dict[str, JsonValue]) -> Workflow:
        checks = self._checks
        checks.refuse_unknown(document, (), WORKFLOW_KEYS)
        allowed = "lower-case letters, digits and dashes"
        workflow_id = checks.identifier(document, (), WORKFLOW_ID, allowed)
        description = self._description(document)
        input_schema = self._input_schema(document)
        timeout_ms = checks.duration(document, "timeout", ())
        retry = checks.retry(document, ())
        flow = flow_control(document, checks)
        started_by, cancelled_by = triggers(document, checks), cancel_on(document, checks)
        root = Level(("steps",))
        steps = self._steps(document.get("steps"), root)
        if "output" in document:
            checks.expressions(document["output"], ("output",), Place(root, None))
        checks.problems.extend(graph_problems(self._levels, checks.mentions))
        if checks.problems:
            raise _refusal(checks.problems)
        return Workflow(
            id=workflow_id,
            description=description,
            input_schema=input_schema,
            output=document.get("output"),
            has_output="output" in document,
            timeout_ms=timeout_ms,
            retry=retry or RetryPolicy(),
            steps=steps,
            document=document,
            flow=expecting(flow, steps),
            triggers=started_by,
            cancel_on=cancelled_by,
        )

    def _description(self, document: Mapping[str, JsonValue]) -> str:
        found = document.get("description", "")
        if isinstance(found, str) and len(found) <= DESCRIPTION_CHARS_MAX:
            return found
        self._note(("description",), f"is text of at most {DESCRIPTION_CHARS_MAX} characters")
        return ""

    def _input_schema(self, document: Mapping[str, JsonValue]) -> Mapping[str, JsonValue] | None:
        if "input" not in document:
            return None
        found = document["input"]
        if not isinstance(found, Mapping):
            self._note(("input",), "is a JSON Schema, such as {type: object}")
            return None
        problem = self._check_schema(found)
        if problem is not None:
            self._note(("input",), f"is no JSON Schema: {problem}")
        return found

    def _steps(self, found: JsonValue, level: Level) -> tuple[Step, ...]:
        """The steps of one block; `level` takes their ids as they are found."""
        self._levels.append(level)
        if not isinstance(found, list) or not found:
            self._note(level.loc, "is required: a list of one step or more")
            return ()
        found = found[: self._counted(len(found), level.loc)]
        return tuple(self._step(value, Place(level, index)) for index, value in enumerate(found))

    def _counted(self, count: int, loc: Loc) -> int:
        """How many of so many further steps a workflow may have."""
        if count > self._steps_left:
            self._note(loc, f"a workflow has at most {STEPS_MAX} steps, inner ones included")
        allowed = min(count, self._steps_left)
        self._steps_left -= allowed
        return allowed

    def _step(self, value: JsonValue, place: Place) -> Step:
        checks, level, index = self._checks, place.level, place.index
        assert index is not None, "a step has an index"
        loc: Loc = (*level.loc, index)
        before = tuple(step_id for step_id, _ in level.steps[-1:] if step_id)
        level.steps.append(("", ()))
        if not isinstance(value, Mapping):
            self._note(loc, "a step is an object with an id and one key that names its type")
            return Step("", "", None)
        step_id = checks.identifier(value, loc, STEP_ID, STEP_ID_FORM)
        needs = self._needs(value, loc, before)
        level.steps[index] = (step_id, needs)
        step = self._body(value, step_id, loc, place, STEP_KEYS)
        return replace(step, needs=needs, when=self._when(value, loc, place))

    def _tool(self, value: JsonValue, step_id: str, loc: Loc, place: Place) -> Step:
        """The step of a tool; its id follows from the tool's name."""
        if isinstance(value, Mapping) and self._counted(1, loc):
            return self._body(value, step_id, loc, place, BODY_KEYS)
        self._note(loc, "is required: an object with one key that names the step's type")
        return Step(step_id, "", None)

    def _body(
        self,
        value: Mapping[str, JsonValue],
        step_id: str,
        loc: Loc,
        place: Place,
        keys: tuple[str, ...],
    ) -> Step:
        """What a step does, without its place among others."""
        checks = self._checks
        step_type = self._type(value, loc, keys)
        step = Step(
            id=step_id,
            type=step_type,
            settings=None,
            retry=checks.retry(value, loc),
            timeout_ms=checks.duration(value, "timeout", loc),
        )
        found = value.get(step_type)
        if not is_with_tools(step_type, found):
            settings, blocks = self._settings(value, step_type, loc, place)
            return replace(step, settings=settings, blocks=blocks)
        assert isinstance(found, Mapping), "it has tools"
        inner = (*loc, step_type)
        own = {key: found[key] for key in found if key not in TOOL_SETTINGS}
        model, _ = self._settings({step_type: own}, step_type, loc, place)
        if self._nests_too_deep(inner, place):
            return step
        forms = ToolForms(checks, self._check_schema, self._tool)
        level = Level((*inner, "tools"), place, step_type)
        self._levels.append(level)
        settings, blocks = forms.with_tools(replace(step, settings=model), found, level)
        # Tries and time-outs are of its turns, as they are of any composite's inner steps.
        return Step(step_id, step_type, settings, blocks=blocks)

    def _type(self, value: Mapping[str, JsonValue], loc: Loc, keys: tuple[str, ...]) -> str:
        self._checks.refuse_unknown(value, loc, (*keys, *self._types), STEP_TYPES_TO_COME)
        types = [key for key in value if key in self._types]
        is_unknown_named = any(key not in keys for key in value)
        if len(types) > 1:
            self._note(loc, f"has {len(types)} types, {' and '.join(types)}: make them two steps")
        elif not types and not is_unknown_named:
            self._note(loc, f"needs one key of {', '.join(self._types)} to name its type")
        return types[0] if len(types) == 1 else ""

    def _needs(
        self, value: Mapping[str, JsonValue], loc: Loc, before: tuple[str, ...]
    ) -> tuple[str, ...]:
        if "needs" not in value:
            return before
        found = value["needs"]
        if not isinstance(found, list) or not all(isinstance(need, str) for need in found):
            self._note((*loc, "needs"), "is a list of step ids; [] needs none")
            return ()
        if len(set(found)) < len(found):
            self._note((*loc, "needs"), "names a step twice")
        return tuple(dict.fromkeys(str(need) for need in found))

    def _when(self, value: Mapping[str, JsonValue], loc: Loc, place: Place) -> str | None:
        if "when" not in value:
            return None
        return self._condition(value["when"], (*loc, "when"), place)

    def _condition(self, found: JsonValue, loc: Loc, place: Place) -> str | None:
        if not isinstance(found, str):
            self._note(loc, "is one CEL expression as text, without braces")
            return None
        self._checks.expression(found, loc, place)
        return found

    def _settings(
        self, value: Mapping[str, JsonValue], step_type: str, loc: Loc, place: Place
    ) -> tuple[JsonValue, tuple[Block, ...]]:
        settings, inner = value.get(step_type), (*loc, step_type)
        if step_type in (*COMPOSITES, *WAITS):
            for key in ("timeout",) if step_type == "workflow" else ("retry", "timeout"):
                if key in value:
                    self._note((*loc, key), f"a {step_type} has no {key} of this kind: remove it")
        if step_type == "wait_for_event" and isinstance(settings, Mapping) and "if" in settings:
            self._condition(settings["if"], (*inner, "if"), place)
        if step_type in COMPOSITES:
            return self._composite(settings, step_type, inner, place)
        if step_type and self._checks.expressions(settings, inner, place):
            self._checks.problems.extend(
                Problem((*inner, *problem.loc), problem.msg)
                for problem in self._step_checks[step_type](settings)
            )
        return settings, ()

    def _composite(
        self, settings: JsonValue, kind: str, loc: Loc, place: Place
    ) -> tuple[JsonValue, tuple[Block, ...]]:
        keys = COMPOSITE_KEYS[kind]
        if not isinstance(settings, Mapping):
            self._note(loc, f"{kind} takes an object of {', '.join(keys)}")
            return None, ()
        self._checks.refuse_unknown(settings, loc, keys)
        if self._nests_too_deep(loc, place):
            return None, ()
        parse = {
            "parallel": self._parallel,
            "map": self._map,
            "branch": self._branch,
            "loop": self._loop,
        }
        blocks = parse[kind](settings, loc, place)
        own = {key: settings[key] for key in settings if key not in ("branches", "cases", "else")}
        own.pop("steps", None)
        return own, blocks

    def _nests_too_deep(self, loc: Loc, place: Place) -> bool:
        depth, at = 1, place.level.around
        while at is not None:
            depth, at = depth + 1, at.level.around
        if depth > NESTING_MAX:
            self._note(loc, f"stands in {depth - 1} composites: at most {NESTING_MAX} may nest")
        return depth > NESTING_MAX

    def _parallel(
        self, settings: Mapping[str, JsonValue], loc: Loc, place: Place
    ) -> tuple[Block, ...]:
        branches, loc = settings.get("branches"), (*loc, "branches")
        if not isinstance(branches, Mapping) or not branches:
            self._note(loc, "is required: an object of lists of steps, by the branches' names")
            return ()
        blocks = []
        for name, steps in branches.items():
            if not STEP_ID.fullmatch(name):
                self._note((*loc, name), f"a branch's name is 1 to 64 {STEP_ID_FORM}")
            level = Level((*loc, name), place, "parallel")
            blocks.append(Block(name, self._steps(steps, level)))
        return tuple(blocks)

    def _map(self, settings: Mapping[str, JsonValue], loc: Loc, place: Place) -> tuple[Block, ...]:
        over, concurrency = settings.get("over"), settings.get("concurrency", 1)
        if not isinstance(over, list) and not (isinstance(over, str) and OPEN in over):
            self._note((*loc, "over"), "is required: a list, or one {{ expression }} that gives it")
        elif self._checks.expressions(over, (*loc, "over"), place) and (
            isinstance(over, str) and len(split(over)) != 1
        ):
            self._note((*loc, "over"), "is one {{ expression }} and nothing around it")
        if not (type(concurrency) is int and 1 <= concurrency <= CONCURRENCY_MAX):
            self._note((*loc, "concurrency"), f"is a number from 1 to {CONCURRENCY_MAX}")
        if settings.get("onError", ON_ERROR[0]) not in ON_ERROR:
            self._note((*loc, "onError"), f"is one of {', '.join(ON_ERROR)}")
        level = Level((*loc, "steps"), place, "map")
        return (Block("", self._steps(settings.get("steps"), level)),)

    def _branch(
        self, settings: Mapping[str, JsonValue], loc: Loc, place: Place
    ) -> tuple[Block, ...]:
        cases = settings.get("cases")
        if not isinstance(cases, list) or not cases:
            self._note((*loc, "cases"), "is required: a list of {when, steps}")
            return ()
        blocks = []
        for index, case in enumerate(cases):
            at = (*loc, "cases", index)
            if not isinstance(case, Mapping):
                self._note(at, "a case is an object of when and steps")
                continue
            self._checks.refuse_unknown(case, at, ("when", "steps"))
            when = self._condition(case.get("when"), (*at, "when"), place)
            level = Level((*at, "steps"), place, "branch")
            blocks.append(Block(str(index), self._steps(case.get("steps"), level), when))
        if "else" in settings:
            level = Level((*loc, "else"), place, "branch")
            blocks.append(Block("else", self._steps(settings["else"], level)))
        return tuple(blocks)

    def _loop(self, settings: Mapping[str, JsonValue], loc: Loc, place: Place) -> tuple[Block, ...]:
        rounds = settings.get("maxRounds")
        if not (type(rounds) is int and 1 <= rounds <= ROUNDS_MAX):
            self._note((*loc, "maxRounds"), f"is required: a number from 1 to {ROUNDS_MAX}")
        level = Level((*loc, "steps"), place, "loop")
        block = Block("", self._steps(settings.get("steps"), level))
        # After its steps: it sees what the last round gave.
        self._condition(settings.get("while"), (*loc, "while"), Place(level, None))
        return (block,)

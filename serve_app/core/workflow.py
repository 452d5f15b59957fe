"""Workflow definitions: the checked value, how a document becomes one, which steps come next.

Owns the format of a definition. Does not know CEL, JSON Schema or any step type: the caller hands
in their checks. Invariant: what `parse_workflow` returns can be run as it stands: every expression
parses, every step it mentions has finished when it is evaluated, and no key was ignored.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from serve_app.core.errors import InvalidWorkflowError, Problem
from serve_app.core.inference import JsonValue
from serve_app.core.plain_json import PROBLEMS_MAX, plain_document
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.core.step_graph import Mention, graph_problems
from serve_app.core.template import Loc, TemplateError, split, texts_in

StepCheck: TypeAlias = Callable[[JsonValue], Sequence[Problem]]

STEPS_MAX = 100
DESCRIPTION_CHARS_MAX = 2_000
ATTEMPTS_MAX = 100  # tries after the first
DURATION_MS_MAX = 366 * 86_400_000

WORKFLOW_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
STEP_ID = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # an identifier, so that CEL can select it
WORKFLOW_KEYS = ("id", "description", "input", "timeout", "retry", "steps", "output")
STEP_KEYS = ("id", "needs", "when", "retry", "timeout")
RETRY_KEYS = ("attempts", "backoff", "maxDelay")
ANSWER_KEYS = frozenset({"version", "createdAt"})  # GET adds them, so that PUT ignores them
WORKFLOW_KEYS_TO_COME = frozenset({"triggers", "concurrency", "rateLimit", "cache"})
STEP_TYPES_TO_COME = frozenset(
    {"http", "parallel", "map", "branch", "loop", "sleep", "wait_for_event", "approval"}
    | {"workflow", "emit", "app", "publish"}
)

_DURATION = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(ms|s|m|h|d)", re.ASCII)
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True, slots=True)
class Step:
    """One node of a definition.

    Args:
        settings: what stands under the key that names the type, expressions not yet filled in.
        needs: ids of the steps that must be done before.
        when: CEL; the step is skipped where it is false. None: always run.
        retry: of the step itself, inside one attempt of the execution. None: no retry.
    """

    id: str
    type: str
    settings: JsonValue
    needs: tuple[str, ...] = ()
    when: str | None = None
    retry: RetryPolicy | None = None
    timeout_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Workflow:
    """A checked definition.

    Args:
        input_schema: JSON Schema of the input; None takes anything.
        output: expressions not yet filled in; counts only where `has_output`.
        has_output: False: the output is that of the last step.
        steps: one or more, in document order.
        document: the definition in plain dicts and lists, as it is stored and shown.
    """

    id: str
    description: str
    input_schema: Mapping[str, JsonValue] | None
    output: JsonValue
    has_output: bool
    timeout_ms: int | None
    retry: RetryPolicy
    steps: tuple[Step, ...]
    document: Mapping[str, JsonValue]

    def step(self, step_id: str) -> Step:
        """The step of this id.

        Raises:
            KeyError: there is none.
        """
        for step in self.steps:
            if step.id == step_id:
                return step
        raise KeyError(step_id)


def parse_workflow(
    document: object,
    *,
    check_expression: Callable[[str], str | None],
    check_schema: Callable[[object], str | None],
    step_checks: Mapping[str, StepCheck],
) -> Workflow:
    """Check a definition and give it as a value.

    Args:
        document: what JSON or YAML gave; nothing is expected of it.
        check_expression: why a text is no expression, or None.
        check_schema: why a value is no JSON Schema, or None.
        step_checks: by step type; each gets settings whose templates parse.

    Raises:
        InvalidWorkflowError: with every problem found, each with its place.
    """
    if not isinstance(document, Mapping):
        raise _refusal([Problem((), "a workflow is an object with id and steps")])
    plain, problems = plain_document(document)
    if problems:
        raise _refusal(problems)
    definition = {key: value for key, value in plain.items() if key not in ANSWER_KEYS}
    return _Parsing(definition, check_expression, check_schema, step_checks).workflow()


def ready_steps(
    workflow: Workflow, done: Collection[str], started: Collection[str]
) -> tuple[Step, ...]:
    """The steps not yet started whose needs are all done, in document order."""
    return tuple(
        step
        for step in workflow.steps
        if step.id not in started and all(need in done for need in step.needs)
    )


def parse_duration_ms(value: object) -> int:
    """Milliseconds of `"1.5h"`-like text or an integer that already counts them.

    Raises:
        ValueError: it is neither, not positive, or longer than 366 days.
    """
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        duration_ms = round(float(match[1]) * _UNIT_MS[match[2]])
    elif isinstance(value, int) and not isinstance(value, bool):
        duration_ms = value
    else:
        raise ValueError('a duration is text such as "30s" (ms, s, m, h, d) or milliseconds')
    if not 0 < duration_ms <= DURATION_MS_MAX:
        raise ValueError("a duration is longer than nothing and at most 366d")
    return duration_ms


def _refusal(problems: Sequence[Problem]) -> InvalidWorkflowError:
    first = problems[0]
    place = ".".join(str(part) for part in first.loc)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"invalid workflow: {place + ': ' if place else ''}{first.msg}{more}"
    return InvalidWorkflowError(message, problems[:PROBLEMS_MAX])


class _Parsing:
    """One pass over a plain document; problems are gathered, not raised."""

    def __init__(
        self,
        document: dict[str, JsonValue],
        check_expression: Callable[[str], str | None],
        check_schema: Callable[[object], str | None],
        step_checks: Mapping[str, StepCheck],
    ) -> None:
        self._document = document
        self._check_expression = check_expression
        self._check_schema = check_schema
        self._step_checks = step_checks
        self._problems: list[Problem] = []
        self._mentions: list[Mention] = []

    def workflow(self) -> Workflow:
        document = self._document
        self._refuse_unknown(document, (), WORKFLOW_KEYS, WORKFLOW_KEYS_TO_COME)
        workflow_id = self._id(document, (), WORKFLOW_ID, "lower-case letters, digits and dashes")
        description = self._description()
        input_schema = self._input_schema()
        timeout_ms = self._duration(document, "timeout", ())
        retry = self._retry(document, ())
        steps = self._steps()
        if "output" in document:
            self._expressions(document["output"], ("output",), None)
        needs = [(step.id, step.needs) for step in steps]
        self._problems.extend(graph_problems(needs, self._mentions))
        if self._problems:
            raise _refusal(self._problems)
        return Workflow(
            id=workflow_id,
            description=description,
            input_schema=input_schema,
            output=document.get("output"),
            has_output="output" in document,
            timeout_ms=timeout_ms,
            retry=retry or RetryPolicy(),
            steps=tuple(steps),
            document=document,
        )

    def _note(self, loc: Loc, message: str) -> None:
        self._problems.append(Problem(loc, message))

    def _refuse_unknown(
        self,
        value: Mapping[str, JsonValue],
        loc: Loc,
        known: Collection[str],
        to_come: Collection[str] = (),
    ) -> None:
        for key in value:
            if key in to_come:
                self._note((*loc, key), f"this release does not carry out {key}: remove it")
            elif key not in known:
                self._note((*loc, key), f"unknown key; known: {', '.join(known)}")

    def _id(
        self, value: Mapping[str, JsonValue], loc: Loc, pattern: re.Pattern[str], allowed: str
    ) -> str:
        found = value.get("id")
        if isinstance(found, str) and pattern.fullmatch(found):
            return found
        self._note((*loc, "id"), f"is required: text of 1 to 64 {allowed}")
        return ""

    def _description(self) -> str:
        found = self._document.get("description", "")
        if isinstance(found, str) and len(found) <= DESCRIPTION_CHARS_MAX:
            return found
        self._note(("description",), f"is text of at most {DESCRIPTION_CHARS_MAX} characters")
        return ""

    def _input_schema(self) -> Mapping[str, JsonValue] | None:
        if "input" not in self._document:
            return None
        found = self._document["input"]
        if not isinstance(found, Mapping):
            self._note(("input",), "is a JSON Schema, such as {type: object}")
            return None
        problem = self._check_schema(found)
        if problem is not None:
            self._note(("input",), f"is no JSON Schema: {problem}")
        return found

    def _duration(self, value: Mapping[str, JsonValue], key: str, loc: Loc) -> int | None:
        if key not in value:
            return None
        try:
            return parse_duration_ms(value[key])
        except ValueError as error:
            self._note((*loc, key), str(error))
            return None

    def _retry(self, value: Mapping[str, JsonValue], loc: Loc) -> RetryPolicy | None:
        if "retry" not in value:
            return None
        retry, loc = value["retry"], (*loc, "retry")
        if not isinstance(retry, Mapping):
            self._note(loc, "is an object, such as {attempts: 2}")
            return None
        self._refuse_unknown(retry, loc, RETRY_KEYS)
        attempts = retry.get("attempts")
        if not (type(attempts) is int and 0 <= attempts <= ATTEMPTS_MAX):
            self._note((*loc, "attempts"), f"is required: an integer from 0 to {ATTEMPTS_MAX}")
            attempts = 0
        backoff = retry.get("backoff", Backoff.EXPONENTIAL.value)
        if backoff not in tuple(Backoff):
            self._note((*loc, "backoff"), f"is one of {', '.join(Backoff)}")
            backoff = Backoff.EXPONENTIAL.value
        max_delay_ms = self._duration(retry, "maxDelay", loc) or RetryPolicy().max_delay_ms
        return RetryPolicy(attempts, Backoff(str(backoff)), max_delay_ms)

    def _steps(self) -> list[Step]:
        found = self._document.get("steps")
        if not isinstance(found, list) or not found:
            self._note(("steps",), "is required: a list of one step or more")
            return []
        if len(found) > STEPS_MAX:
            self._note(("steps",), f"has more than {STEPS_MAX} steps: split the workflow")
        steps: list[Step] = []
        for index, value in enumerate(found[:STEPS_MAX]):
            before = (steps[-1].id,) if steps and steps[-1].id else ()
            steps.append(self._step(value, index, before))
        return steps

    def _step(self, value: JsonValue, index: int, before: tuple[str, ...]) -> Step:
        loc: Loc = ("steps", index)
        if not isinstance(value, Mapping):
            self._note(loc, "a step is an object with an id and one key that names its type")
            return Step("", "", None)
        step_type = self._type(value, loc)
        settings = value.get(step_type)
        if step_type and self._expressions(settings, (*loc, step_type), index):
            self._problems.extend(
                Problem((*loc, step_type, *problem.loc), problem.msg)
                for problem in self._step_checks[step_type](settings)
            )
        return Step(
            id=self._id(value, loc, STEP_ID, "letters, digits and _, no digit first"),
            type=step_type,
            settings=settings,
            needs=self._needs(value, loc, before),
            when=self._when(value, loc, index),
            retry=self._retry(value, loc),
            timeout_ms=self._duration(value, "timeout", loc),
        )

    def _type(self, value: Mapping[str, JsonValue], loc: Loc) -> str:
        self._refuse_unknown(value, loc, (*STEP_KEYS, *self._step_checks), STEP_TYPES_TO_COME)
        types = [key for key in value if key in self._step_checks]
        is_unknown_named = any(key not in STEP_KEYS for key in value)
        if len(types) > 1:
            self._note(loc, f"has {len(types)} types, {' and '.join(types)}: make them two steps")
        elif not types and not is_unknown_named:
            self._note(loc, f"needs one key of {', '.join(self._step_checks)} to name its type")
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

    def _when(self, value: Mapping[str, JsonValue], loc: Loc, index: int) -> str | None:
        if "when" not in value:
            return None
        found, loc = value["when"], (*loc, "when")
        if not isinstance(found, str):
            self._note(loc, "is one CEL expression as text, without braces")
            return None
        self._expression(found, loc, index)
        return found

    def _expressions(self, value: JsonValue, loc: Loc, index: int | None) -> bool:
        """Check all templates of a value; whether they parse."""
        problem_count = len(self._problems)
        for place, text in texts_in(value, loc):
            try:
                pieces = split(text)
            except TemplateError as error:
                self._note(place, str(error))
                continue
            for piece in pieces:
                if piece.is_expression:
                    self._expression(piece.text, place, index)
        return len(self._problems) == problem_count

    def _expression(self, text: str, loc: Loc, index: int | None) -> None:
        problem = self._check_expression(text)
        if problem is None:
            self._mentions.append(Mention(loc, text, index))
        else:
            self._note(loc, f"{text[:100]!r} is no CEL expression: {problem}")

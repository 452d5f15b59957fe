"""Tools that a model may call: what one turn may do, what it said, what it is told of it.

A `generate` with tools is a composite of rounds. The block of a round, `ask/2`, holds one turn of
the model, `ask/2/ask.model`, and at most one call, `ask/2/ask.weather`; each is a step of its own
in the journal. Invariant: everything here follows from recorded outputs alone, so whichever worker
asks for the next turn sends the model the same messages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from serve_app.core.execution import Execution, StepState, StepStatus
from serve_app.core.inference import JsonValue
from serve_app.core.workflow import GENERATE, Step, Workflow

ROUNDS_DEFAULT = 5
ROUNDS_MAX = 50  # each has the whole conversation so far in its prompt
MODEL = "model"  # what a turn's own step is called, so no tool is

# Members of a turn's recorded output.
CONTENT, TOOL_CALL, PROBLEM, TEXT = "content", "tool_call", "problem", "text"


@dataclass(frozen=True, slots=True)
class Tool:
    """What a model is told of one tool; `parameters` is a JSON Schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a model may do in one round, and how the rounds before went.

    Args:
        tools: all there are: they are described alike in every round, so that prompts share their
            beginning.
        callable: names of those it may call now; none: it must answer.
        must_call: it may not answer.
        exchanges: of each round before, what the model said and what it was told.
    """

    tools: tuple[Tool, ...]
    callable: tuple[str, ...]
    must_call: bool
    exchanges: tuple[tuple[str, str], ...]


def has_tools(step: Step) -> bool:
    """Whether the step is a composite of rounds."""
    return step.type == GENERATE and bool(step.blocks)


def model_id(step_id: str) -> str:
    """The id of a turn's step."""
    return f"{step_id}.{MODEL}"


def tool_id(step_id: str, name: str) -> str:
    """The id of a call's step."""
    return f"{step_id}.{name}"


def turn_rounds_max(step: Step) -> int:
    """Rounds of a `generate` with tools, the last one, in which it must answer, included."""
    found = step.setting("max_tool_rounds")
    assert isinstance(found, int), "a checked definition has it"
    return found + 1


def turn_of(execution: Execution, workflow: Workflow, path: str) -> Turn | None:
    """What the model may do in the turn that is this step; None: it is no turn with tools."""
    block = path.rpartition("/")[0]
    composite, _, key = block.rpartition("/")
    if not composite or not has_tools(step := workflow.step(composite)):
        return None
    if path != f"{block}/{model_id(step.id)}":
        return None
    rounds = range(int(key))
    calls = [_member(execution, f"{composite}/{index}", step, TOOL_CALL) for index in rounds]
    tools = _tools(step)
    names = tuple(tool.name for tool in tools)
    choice = step.setting("tool_choice")
    is_forced = choice not in ("auto", "none") and not any(calls)
    if choice == "none" or int(key) + 1 >= turn_rounds_max(step):
        names = ()
    elif is_forced and isinstance(choice, Mapping):
        names = (_named(choice),)
    exchanges = tuple(_exchange(execution, f"{composite}/{index}", step) for index in rounds)
    return Turn(tools, names, bool(names) and is_forced, exchanges)


def steps_to_start(execution: Execution, workflow: Workflow, block: str) -> tuple[Step, ...]:
    """The steps of a block that may ever start: of a round, the turn and what it has called."""
    steps = workflow.steps_at(block)
    composite = block.rpartition("/")[0]
    if not composite or not has_tools(step := workflow.step(composite)):
        return steps
    call = _member(execution, block, step, TOOL_CALL)
    called = tool_id(step.id, _text(call, "name")) if call is not None else ""
    return tuple(one for one in steps if one.id in (model_id(step.id), called))


def arguments_in(execution: Execution, workflow: Workflow, block: str) -> JsonValue:
    """What the model gave to the tool it called in a round; null before it has."""
    step = workflow.step(block.rpartition("/")[0])
    call = _member(execution, block, step, TOOL_CALL)
    return call.get("arguments") if isinstance(call, Mapping) else None


def has_answered(execution: Execution, block: str, step: Step) -> bool:
    """Whether the model's turn of a round was its answer."""
    said = _said(execution, block, step)
    return isinstance(said, Mapping) and CONTENT in said


def answer_in(execution: Execution, block: str, step: Step) -> JsonValue:
    """The answer that a round was."""
    return _member(execution, block, step, CONTENT)


def is_told(workflow: Workflow, composite: str, step_id: str) -> bool:
    """Whether the model is told of this tool's failure, which then fails nothing else."""
    step = workflow.step(composite)
    offered = step.setting("tools")
    if not has_tools(step) or not isinstance(offered, list):
        return False
    policies = {tool_id(step.id, _text(one, "name")): _text(one, "on_error") for one in offered}
    return policies.get(step_id) == "tell"


def _tools(step: Step) -> tuple[Tool, ...]:
    offered = step.setting("tools")
    assert isinstance(offered, list), "a checked definition has them"
    found = []
    for one in offered:
        assert isinstance(one, Mapping), "likewise"
        parameters = one.get("parameters")
        assert isinstance(parameters, Mapping), "likewise"
        found.append(Tool(_text(one, "name"), _text(one, "description"), parameters))
    return tuple(found)


def _exchange(execution: Execution, block: str, step: Step) -> tuple[str, str]:
    said = _text(_said(execution, block, step), TEXT)
    call = _member(execution, block, step, TOOL_CALL)
    if call is None:
        return said, f"No tool was called: {_member(execution, block, step, PROBLEM)}"
    name = _text(call, "name")
    state = execution.steps[f"{block}/{tool_id(step.id, name)}"]
    return said, _result(name, state)


def _result(name: str, state: StepState) -> str:
    if state.status is not StepStatus.COMPLETED:
        return f"{name} failed: {state.error or state.status}"
    output = state.output
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    return f"Result of {name}:\n{text}"


def _named(choice: Mapping[str, JsonValue]) -> str:
    return _text(choice.get("function"), "name")


def _said(execution: Execution, block: str, step: Step) -> JsonValue:
    state = execution.steps.get(f"{block}/{model_id(step.id)}")
    return None if state is None else state.output


def _member(execution: Execution, block: str, step: Step, name: str) -> JsonValue:
    said = _said(execution, block, step)
    return said.get(name) if isinstance(said, Mapping) else None


def _text(value: JsonValue, name: str) -> str:
    found = value.get(name) if isinstance(value, Mapping) else None
    return found if isinstance(found, str) else ""

"""What an expression sees: the variables at one place of a running execution.

Owns visibility at run time, as `step_graph.py` owns it in a definition. Invariant: what an
expression may mention has finished, so evaluating it again, on any worker, gives the same value.
"""

from collections.abc import Callable, Iterator, Mapping

from serve_app.core.execution import Execution, StepStatus
from serve_app.core.tools import arguments_in
from serve_app.core.workflow import GENERATE, Workflow

Scope = Mapping[str, object]
Evaluate = Callable[[str, Scope], object]

FINISHED = frozenset({StepStatus.COMPLETED, StepStatus.SKIPPED})


def block_of(path: str) -> str:
    """The block a step stands in: `each/3` of `each/3/fetch`; "" outside of any composite."""
    return path.rpartition("/")[0]


def composite_of(block: str) -> str:
    """The composite a block belongs to: `each` of `each/3`; "" for the workflow's own steps."""
    return block.rpartition("/")[0]


def in_block(block: str, step_id: str) -> str:
    """The path of a step of a block."""
    return f"{block}/{step_id}" if block else step_id


def blocks_around(path: str) -> Iterator[str]:
    """The blocks a step stands in, outermost first, the workflow's own excepted."""
    parts = path.split("/")
    for end in range(2, len(parts), 2):
        yield "/".join(parts[:end])


def scope_of(execution: Execution, workflow: Workflow, path: str = "") -> dict[str, object]:
    """The variables at a step, or "" for the workflow's output; a skipped step's output is null.

    A step sees the steps before its composite, the earlier ones of its block and, in a loop, all
    of the round before: null in the first.
    """
    created = execution.created
    steps: dict[str, object] = {}
    scope: dict[str, object] = {
        "input": created.input,
        "steps": steps,
        "event": {} if created.trigger is None else created.trigger.shown(created.input),
        "execution": {
            "id": execution.id,
            "workflowId": created.workflow_id,
            "workflowVersion": created.workflow_version,
            "workspaceId": created.workspace,
            "userId": created.user_id,
            "metadata": created.metadata,
            "attempt": execution.attempt,
        },
    }
    _add_outputs(steps, execution, workflow, "")
    for block in blocks_around(path):
        composite, _, key = block.rpartition("/")
        kind = workflow.step(composite).type
        if kind == "map":
            scope["index"] = int(key)
            items = execution.steps[composite].items
            assert items is not None, "its steps start after it has its items"
            scope["item"] = items[int(key)]
        elif kind == "loop":
            _add_round(steps, execution, workflow, f"{composite}/{int(key) - 1}")
        elif kind == GENERATE:
            scope["args"] = arguments_in(execution, workflow, block)
            continue
        _add_outputs(steps, execution, workflow, block)
    return scope


def scope_after_round(
    execution: Execution, workflow: Workflow, composite: str, rounds: int
) -> dict[str, object]:
    """What a loop's `while` sees after so many rounds."""
    scope = scope_of(execution, workflow, composite)
    steps = scope["steps"]
    assert isinstance(steps, dict), "made above"
    _add_round(steps, execution, workflow, f"{composite}/{rounds - 1}")
    return scope


def _add_round(
    steps: dict[str, object], execution: Execution, workflow: Workflow, block: str
) -> None:
    steps.update((step.id, {"output": None}) for step in workflow.steps_at(block))
    _add_outputs(steps, execution, workflow, block)


def _add_outputs(
    steps: dict[str, object], execution: Execution, workflow: Workflow, block: str
) -> None:
    for step in workflow.steps_at(block):
        state = execution.steps.get(in_block(block, step.id))
        if state is not None and state.status in FINISHED:
            steps[step.id] = {"output": state.output}

"""What follows inside composites: which blocks open, when one is over, what it all gave.

A composite (`parallel`, `map`, `branch`, `loop`, a `generate` with tools) is `running` while its
blocks run; it has no task of its own, and its output is composed in the commit that ends its last
block. Nothing here is remembered between calls: open blocks follow from the live steps, and started
ones are found by bisection, because items and rounds start in order. So a decision costs what runs,
not what ran.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator

from serve_app.core.execution import Execution, StepState, StepStatus
from serve_app.core.inference import JsonValue
from serve_app.core.plain_json import json_bytes
from serve_app.core.scope import FINISHED, block_of, composite_of, in_block
from serve_app.core.tools import answer_in, has_tools, is_told, turn_rounds_max
from serve_app.core.workflow import GENERATE, Step, Workflow

MAP_CONCURRENCY_DEFAULT = 10
MAP_ITEMS_MAX = 10_000
LIVE_MAX = 256  # steps of one execution at work at once; beyond it a map opens one item at a time
STARTED_MAX = 20_000  # steps of one execution, items and rounds counted: all are in its snapshot


def goes_on_without(workflow: Workflow, path: str) -> bool:
    """Whether the composite around a step goes on should it fail: its block is over, no more."""
    composite = composite_of(block_of(path))
    if not composite:
        return False
    step_id = path.rpartition("/")[2]
    is_skipping = workflow.step(composite).setting("onError") == "skip"
    return is_skipping or is_told(workflow, composite, step_id)


def is_forgiven(workflow: Workflow, path: str) -> bool:
    """Whether the step, or one around it that would fail with it, may fail without harm."""
    parts = path.split("/")
    units = ("/".join(parts[:end]) for end in range(3, len(parts) + 1, 2))
    return any(goes_on_without(workflow, unit) for unit in units)


def is_composite(workflow: Workflow, path: str) -> bool:
    """Whether the step holds steps."""
    return bool(workflow.step(path).blocks)


def is_running(execution: Execution, composite: str) -> bool:
    """Whether blocks may run in it; the workflow itself always may."""
    state = execution.steps.get(composite)
    return not composite or (state is not None and state.status is StepStatus.RUNNING)


def failed_steps(
    execution: Execution, workflow: Workflow, touched: Collection[str] | None
) -> list[tuple[str, str]]:
    """Failed inner steps whose failure is not dealt with, and the block or composite each ends.

    Sorted, so that of two failures at once every worker names the same one. A failure under
    `onError: skip`, or of a tool whose model is told, is dealt with once nothing of its block is
    live.
    """
    found = []
    for path in execution.steps if touched is None else touched:
        if "/" not in path:
            continue
        block = block_of(path)
        composite = composite_of(block)
        is_failed = execution.steps[path].status is StepStatus.FAILED
        if is_failed and is_running(execution, composite):
            found.append((path, block if goes_on_without(workflow, path) else composite))
    return sorted(found)


def live_under(execution: Execution, prefix: str) -> tuple[str, ...]:
    """The live steps inside a block or a composite."""
    return tuple(path for path in execution.live_steps if path.startswith(f"{prefix}/"))


def blocks_to_examine(
    execution: Execution, workflow: Workflow, touched: Collection[str] | None
) -> Iterator[str]:
    """Yield blocks in which something may be due.

    `touched` names the steps whose state changed since the last examination; None: any may have.
    """
    if touched is not None:
        yield from dict.fromkeys(block_of(path) for path in touched)
        return
    yield ""
    for path in execution.live_steps:
        if is_composite(workflow, path):
            yield from started_blocks(execution, workflow, path)


def started_blocks(execution: Execution, workflow: Workflow, composite: str) -> list[str]:
    """The blocks of a composite in which a step has started or was skipped, in order."""
    step = workflow.step(composite)
    if step.type in ("parallel", "branch"):
        blocks = [f"{composite}/{block.key}" for block in step.blocks]
        return [block for block in blocks if is_started(execution, workflow, block)]
    count = started_count(execution, workflow, composite)
    return [f"{composite}/{index}" for index in range(count)]


def started_count(execution: Execution, workflow: Workflow, composite: str) -> int:
    """How many items or rounds have begun."""
    step = workflow.step(composite)
    items = execution.steps[composite].items or ()
    size = len(items) if step.type == "map" else rounds_max(step)
    return bisect_left(
        range(size),
        1,
        key=lambda index: not is_started(execution, workflow, f"{composite}/{index}"),
    )


def rounds_max(step: Step) -> int:
    """Of a loop, or of a `generate` with tools."""
    if has_tools(step):
        return turn_rounds_max(step)
    found = step.setting("maxRounds")
    assert isinstance(found, int), "a checked definition has it"
    return found


def concurrency(step: Step) -> int:
    """Of a map."""
    found = step.setting("concurrency")
    return found if isinstance(found, int) else MAP_CONCURRENCY_DEFAULT


def is_started(execution: Execution, workflow: Workflow, block: str) -> bool:
    """Whether any of its steps has a state."""
    return any(in_block(block, step.id) in execution.steps for step in workflow.steps_at(block))


def output_of(execution: Execution, workflow: Workflow, composite: str) -> JsonValue:
    """What a composite gives, all its blocks being over."""
    kind = workflow.step(composite).type
    blocks = started_blocks(execution, workflow, composite)
    if kind == "map":
        return [_block_output(execution, workflow, block) for block in blocks]
    if kind == "parallel":
        return {
            block.rpartition("/")[2]: _block_output(execution, workflow, block) for block in blocks
        }
    if kind == GENERATE:
        return answer_in(execution, blocks[-1], workflow.step(composite))
    return _block_output(execution, workflow, blocks[-1]) if blocks else None


def _block_output(execution: Execution, workflow: Workflow, block: str) -> JsonValue:
    """The last step's output; null where the block failed."""
    states = [execution.steps.get(in_block(block, step.id)) for step in workflow.steps_at(block)]
    is_whole = all(state is not None and state.status in FINISHED for state in states)
    return states[-1].output if is_whole and states[-1] is not None else None


def outgrowth(
    execution: Execution, workflow: Workflow, composite: str, bytes_max: int
) -> str | None:
    """Why what a map or a parallel gives, as far as its blocks are over, is too large, or None."""
    taken = 0
    for count, block in enumerate(started_blocks(execution, workflow, composite), start=1):
        # Its brackets and commas, and the names of branches, are left out: the bound is no cliff.
        taken += json_bytes(_block_output(execution, workflow, block))
        if taken > bytes_max:
            return (
                f"the results of {count} blocks take {taken} bytes together; "
                f"INFERPIPE_RESULT_MAX_BYTES allows {bytes_max}"
            )
    return None


def failure_of(path: str, step: StepState) -> str:
    """The error that a composite takes from the inner step that failed it: the deepest path."""
    error = step.error or "failed"
    return error if error.startswith(f"{path}/") else f"{path}: {error}"


def progress_share(execution: Execution, workflow: Workflow, block: str) -> float:
    """How much of a block is done, 0 to 1: each step counts the same."""
    steps = workflow.steps_at(block)
    shares = (_step_share(execution, workflow, in_block(block, step.id)) for step in steps)
    return sum(shares) / len(steps)


def _step_share(execution: Execution, workflow: Workflow, path: str) -> float:
    state = execution.steps.get(path)
    if state is None:
        return 0.0
    if state.status in FINISHED:
        return 1.0
    step = workflow.step(path)
    if not step.blocks:
        return 0.0
    blocks = started_blocks(execution, workflow, path)
    total = {
        "map": len(state.items or ()),
        "parallel": len(step.blocks),
        "branch": 1,
        "loop": rounds_max(step) if step.type == "loop" else 1,
        GENERATE: rounds_max(step) if has_tools(step) else 1,
    }[step.type]
    done = sum(progress_share(execution, workflow, block) for block in blocks)
    return min(1.0, done / total) if total else 1.0

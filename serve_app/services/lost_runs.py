"""What the runs of a lost worker had emitted, read from the journal by the one that takes over.

Owns the choice of the steps that can go on, and the reading. Decides nothing else. Invariant: a
step whose journal is not whole here is not gone on with; it starts again.
"""

import logging

from serve_app.core.decisions import RESUMES_MAX, orphans
from serve_app.core.emitted import Emitted, emitted_by_steps
from serve_app.core.errors import OverloadedError, StoreUnavailableError
from serve_app.core.execution import Event, Execution
from serve_app.core.workflow import Workflow
from serve_app.services.planner import Runtime

logger = logging.getLogger(__name__)

PAGE = 1_000  # events read at once
STORE_RETRY_S = 0.5


async def lost_runs(
    execution: Execution, workflow: Workflow, runtime: Runtime
) -> dict[str, Emitted]:
    """By step, what there is to go on from; asked of the store until it answers."""
    steps = {
        path: execution.steps[path]
        for path in orphans(execution, workflow)
        if execution.steps[path].losses < RESUMES_MAX and _can_resume(path, workflow, runtime)
    }
    if not steps:
        return {}
    first_seq = min(step.began_seq for step in steps.values())
    while True:
        try:
            events = await _events(execution, first_seq, runtime)
        except (StoreUnavailableError, OverloadedError):
            logger.exception("journal not read yet", extra={"execution_id": execution.id})
            await runtime.clock.sleep(STORE_RETRY_S)
        else:
            found = emitted_by_steps(events)
            return {path: found[path] for path in steps if path in found}


def _can_resume(path: str, workflow: Workflow, runtime: Runtime) -> bool:
    step = workflow.step(path)
    return runtime.step_types[step.type].can_resume(step.settings)


async def _events(execution: Execution, first_seq: int, runtime: Runtime) -> list[Event]:
    """Those from `first_seq` to the execution's last; none where one of them is missing."""
    events: list[Event] = []
    seq = max(0, first_seq - 1)
    while seq < execution.seq:
        page = await runtime.store.read(execution.id, seq, min(PAGE, execution.seq - seq))
        if not page or [one.seq for one in page] != list(range(seq + 1, seq + len(page) + 1)):
            return []
        events += [stored.event for stored in page]
        seq += len(page)
    return events

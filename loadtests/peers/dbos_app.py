"""DBOS: a library, so its front and its worker are one process."""

import sys
import uuid

from dbos import DBOS, DBOSConfig, SetWorkflowID

from loadtests.peers.front import Front, serve
from loadtests.peers.work import STEPS, Work, notes_here, run_step

notes = notes_here()


@DBOS.step()
async def one_step(ms: int, step: int) -> int:
    """A recorded step."""
    return await run_step(notes, Work(ms), step)


@DBOS.step(preemptible=True)
async def watched_step(ms: int, watched: str, step: int) -> int:
    """One that a cancel stops; DBOS's plain steps run to their end."""
    return await run_step(notes, Work(ms, watched), step)


@DBOS.workflow()
async def three(ms: int, watched: str) -> int:
    """Three recorded steps."""
    for step in STEPS:
        if watched:
            await watched_step(ms, watched, step)
        else:
            await one_step(ms, step)
    return len(STEPS)


async def open_nothing() -> None:
    """DBOS is launched before the loop."""


async def run(work: Work) -> None:
    """Run it and wait for it."""
    await three(work.ms, work.id)


async def start(work: Work) -> None:
    """Return when it is recorded."""
    with SetWorkflowID(work.id or str(uuid.uuid4())):
        await DBOS.start_workflow_async(three, work.ms, work.id)


async def cancel(workflow_id: str) -> None:
    """Cancel it."""
    await DBOS.cancel_workflow_async(workflow_id)


def main() -> None:
    """Serve on the port given, over the database given."""
    config: DBOSConfig = {
        "name": "three",
        "system_database_url": sys.argv[2],
        "application_version": "1",
        "log_level": "ERROR",
        "enable_otlp": False,
        "notification_listener_polling_interval_sec": 0.01,
    }
    DBOS(config=config)
    DBOS.launch()
    serve(Front(open_nothing, run, start, cancel), int(sys.argv[1]))


if __name__ == "__main__":
    main()

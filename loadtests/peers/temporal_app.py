"""Temporal's worker and front: a workflow of three activities, or of three local ones."""

import asyncio
import sys
import uuid
from datetime import timedelta

import uvloop
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.runtime import Runtime, TelemetryConfig
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from loadtests.peers.front import Front, serve
from loadtests.peers.work import STEPS, Notes, Work, notes_here, run_step

QUEUE = "three"
STEP_WITHIN = timedelta(seconds=60)
BEAT_S = 0.1
SILENT = timedelta(seconds=1)  # an activity without a heartbeat for so long is tried again
_notes: list[Notes] = []


async def _beat() -> None:
    while True:
        activity.heartbeat()
        await asyncio.sleep(BEAT_S)


@activity.defn
async def one_step(ms: int, watched: str, step: int) -> int:
    """A recorded step; a watched one shows that it lives, which is how it hears of a cancel."""
    work = Work(ms, watched)
    if not watched:
        return await run_step(_notes[0], work, step)
    beating = asyncio.get_running_loop().create_task(_beat())
    try:
        return await run_step(_notes[0], work, step)
    finally:
        beating.cancel()


@workflow.defn(name="three", sandboxed=False)
class Three:
    """Three recorded steps."""

    @workflow.run
    async def run(self, ms: int, watched: str, is_local: bool) -> int:  # noqa: FBT001 - JSON
        """Run them in order."""
        for step in STEPS:
            arguments = [ms, watched, step]
            if is_local:
                await workflow.execute_local_activity(
                    one_step, args=arguments, start_to_close_timeout=STEP_WITHIN
                )
            else:
                await workflow.execute_activity(
                    one_step,
                    args=arguments,
                    start_to_close_timeout=STEP_WITHIN,
                    heartbeat_timeout=SILENT if watched else None,
                )
        return len(STEPS)


class Starter:
    """The front's client."""

    def __init__(self, address: str, *, is_local: bool) -> None:
        self._address = address
        self._is_local = is_local
        self._client: Client | None = None

    async def open(self) -> None:
        """Connect."""
        self._client = await _connect(self._address)

    async def start(self, work: Work) -> None:
        """Return when it is recorded."""
        assert self._client is not None, "opened first"
        await self._client.start_workflow(
            "three",
            args=[work.ms, work.id, self._is_local],
            id=work.id or str(uuid.uuid4()),
            task_queue=QUEUE,
        )

    async def run(self, work: Work) -> None:
        """Run it and wait for it."""
        assert self._client is not None, "opened first"
        await self._client.execute_workflow(
            "three",
            args=[work.ms, work.id, self._is_local],
            id=work.id or str(uuid.uuid4()),
            task_queue=QUEUE,
        )

    async def cancel(self, workflow_id: str) -> None:
        """Cancel it."""
        assert self._client is not None, "opened first"
        await self._client.get_workflow_handle(workflow_id).cancel()


async def _connect(address: str) -> Client:
    runtime = Runtime(telemetry=TelemetryConfig(metrics=None))
    return await Client.connect(address, runtime=runtime)


async def _work(address: str) -> None:
    _notes.append(notes_here())
    worker = Worker(
        await _connect(address),
        task_queue=QUEUE,
        workflows=[Three],
        activities=[one_step],
        workflow_runner=UnsandboxedWorkflowRunner(),
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=1),
        max_heartbeat_throttle_interval=timedelta(seconds=BEAT_S),
        default_heartbeat_throttle_interval=timedelta(seconds=BEAT_S),
    )
    await worker.run()


def main() -> None:
    """`worker <address>`, or `front <address> <port> [local]`."""
    role, address = sys.argv[1:3]
    if role == "worker":
        uvloop.run(_work(address))
        return
    starter = Starter(address, is_local=sys.argv[4:] == ["local"])
    front = Front(starter.open, starter.run, starter.start, starter.cancel)
    serve(front, int(sys.argv[3]))


if __name__ == "__main__":
    main()

"""Celery: a chain of three tasks. The front hears of results where Celery publishes them."""

import asyncio
import os
import signal
import sys
import time
import uuid
from types import FrameType

from celery import Celery, chain
from redis.asyncio import Redis

from loadtests.peers.front import Front, serve
from loadtests.peers.work import STEPS, Work, notes_here

VISIBLE_AGAIN_S = 5  # an unfinished task is handed out again after so long; Celery's default: 1 h
URL = os.environ["PEERS_REDIS"]
RESULT = "celery-task-meta-"  # Celery's own: a result's key, and the channel that tells of it

app = Celery("loadtests.peers.celery_app", broker=URL, backend=URL)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=4,
    broker_transport_options={
        "visibility_timeout": VISIBLE_AGAIN_S,
        "unacked_restore_interval": 1,  # seconds between looks for them; the default is 10
        "unacked_restore_throttle": 1,  # of so many looks one is taken; the default is 10
    },
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    result_expires=600,
)
notes = notes_here()


class _StoppedError(BaseException):
    """The step's process was told to end."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _StoppedError


@app.task
def one_step(ms: int, watched: str, step: int) -> int:
    """A step; its return value is recorded."""
    work = Work(ms, watched)
    before = signal.signal(signal.SIGTERM, _stop) if watched else None
    notes.note("started", work, step)
    try:
        if ms:
            time.sleep(ms / 1000)
    except _StoppedError:
        notes.note("stopped", work, step)
        raise SystemExit(1) from None
    finally:
        if watched:
            signal.signal(signal.SIGTERM, before)
    notes.note("ended", work, step)
    notes.ended(step)
    return step


class Results:
    """Who waits for which task's result."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def open(self) -> None:
        """Subscribe, and hand out what is heard until the process ends."""
        channels = Redis.from_url(URL).pubsub()
        await channels.psubscribe(f"{RESULT}*")
        self._listening = asyncio.get_running_loop().create_task(self._listen(channels))

    async def _listen(self, channels: object) -> None:
        async for message in channels.listen():  # type: ignore[attr-defined]
            if message["type"] == "pmessage":
                waiting = self._waiting.pop(message["channel"].decode().removeprefix(RESULT), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)

    def of(self, task_id: str) -> "asyncio.Future[None]":
        """Done when the task's result is there."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[task_id] = future
        return future


results = Results()


def _send(work: Work, last_id: str) -> None:
    steps = [one_step.si(work.ms, work.id, step) for step in STEPS]
    if work.id:
        steps[0].set(task_id=f"{work.id}-1")  # so that it can be revoked by name
    steps[-1].set(task_id=last_id)
    chain(*steps).apply_async()


async def run(work: Work) -> None:
    """Send the chain and wait for its last result."""
    last_id = str(uuid.uuid4())
    done = results.of(last_id)
    _send(work, last_id)
    await done


async def start(work: Work) -> None:
    """Return when the broker has the first task."""
    _send(work, str(uuid.uuid4()))


async def cancel(work_id: str) -> None:
    """Stop its first step."""
    app.control.revoke(f"{work_id}-1", terminate=True, signal="SIGTERM")


if __name__ == "__main__":
    serve(Front(results.open, run, start, cancel), int(sys.argv[1]))

"""Long-lived coroutines of a replica: started in its constructor, watched by its health check.

Owns what asyncio leaves open: a task that dies unseen. Invariant: when one ends, for whatever
reason, `check` raises, Serve replaces the replica, and the log says why.
"""

import asyncio
import logging
from collections.abc import Coroutine

logger = logging.getLogger(__name__)

STOP_WAIT_S = 5.0


class Background:
    """The coroutines that serve as long as the replica does."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[object, object, None]) -> None:
        """Run a coroutine that should never end."""
        # Not in a TaskGroup: a replica's constructor returns while its services go on.
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(_log_end)
        self._tasks.append(task)

    def check(self) -> None:
        """Raise when one has ended."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"{task.get_name()} has ended; its log entry says why")

    async def stop(self) -> None:
        """Cancel all and wait for their clean-up."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_WAIT_S)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("%s died", task.get_name(), exc_info=task.exception())

"""A process that must not outlive the one that started it.

vLLM's engine process watches its own children and not its parent: after a kill -9 of the replica it
would stay for ever, with the model, the KV cache and the card's memory. Owns the watch alone.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading

logger = logging.getLogger(__name__)


def end_with_parent() -> None:
    """Have this process end when its parent has; told by the kernel, at once.

    For a process that `multiprocessing` has started; in any other it does nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A thread, because the main one may be inside a model's step; nothing waits for it.
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    logger.error("the parent process is gone")
    os._exit(1)

"""A process with `end_with_parent` is gone as soon as its parent is, however that died."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil

from serve_app.adapters.parent_process import end_with_parent

GONE_WITHIN_S = 20.0


def child() -> None:
    """Say its id, then never end by itself."""
    end_with_parent()
    print(os.getpid(), flush=True)
    while True:
        time.sleep(60)


def parent() -> None:
    """Start the child as vLLM starts its engine, and wait for it."""
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()


def test_child_ends_with_a_killed_parent() -> None:
    """kill -9 leaves the parent no time to say anything."""
    program = f"from {__name__} import parent; parent()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as started:
        try:
            assert started.stdout is not None
            orphan = psutil.Process(int(started.stdout.readline()))
            assert orphan.is_running()
        finally:
            started.send_signal(signal.SIGKILL)
    try:
        orphan.wait(GONE_WITHIN_S)
    finally:
        if orphan.is_running():
            orphan.kill()

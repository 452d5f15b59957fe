"""Processes of a peer: started in a session of their own, read off for CPU, killed.

Owns every process that is started here. Invariant: nothing outlives the `with` of its `Parts`.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".inferpipe" / "peers"  # not in git, like all of `.inferpipe`
READY_WITHIN_S = 60.0
# Where a peer reports home unless told not to, this tells it.
SILENT = {
    "DO_NOT_TRACK": "1",
    "RESTATE_DISABLE_TELEMETRY": "true",
    "TEMPORAL_VERSION_CHECK_DISABLED": "1",
}


class NotStartedError(RuntimeError):
    """A peer is not installed, or did not get ready; the table says so."""


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Part:
    """One process and its children, in a session of their own."""

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str], user: str | None = None
    ) -> None:
        self._command = command
        self._log = log
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), **SILENT, **env}
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, the first time or again."""
        try:
            with self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=ROOT if self._user is None else self._log.parent,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    user=self._user,
                )
        except OSError as error:
            raise NotStartedError(f"{self._command[0]}: {error.strerror}") from error

    def wait_for_port(self, port: int) -> None:
        """Return when something listens there."""
        give_up_s = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                self.check(give_up_s)
                time.sleep(0.02)
            else:
                return

    def check(self, give_up_s: float) -> None:
        """Raise NotStartedError when it has ended, or the time is over."""
        assert self._process is not None, "started by its constructor"
        if self._process.poll() is not None or time.monotonic() > give_up_s:
            tail = self._log.read_text(errors="replace")[-600:]
            raise NotStartedError(f"{Path(self._command[0]).name} did not get ready: {tail}")

    def kill(self) -> None:
        """SIGKILL the whole session."""
        if self._process is not None and self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def cpu_s(self) -> float:
        """User and system seconds so far, of all its processes."""
        assert self._process is not None, "started by its constructor"
        try:
            root = psutil.Process(self._process.pid)
            return sum(map(_seconds, [root, *root.children(recursive=True)]))
        except psutil.NoSuchProcess:
            return 0.0


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


class Parts:
    """All processes of one peer; killed, last first, when the `with` ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all: list[Part] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for part in reversed(self._all):
            part.kill()

    def add(
        self,
        name: str,
        *command: str,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> Part:
        """Start one more."""
        part = Part(command, self.folder / f"{name}.log", env or {}, user)
        self._all.append(part)
        return part

    def cpu_s(self) -> float:
        """Seconds so far, of all."""
        return sum(part.cpu_s() for part in self._all)

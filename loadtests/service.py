"""The service under load: started as the end-to-end tests start it, and its costs read off.

Owns the start and stop, and the sums of CPU and memory over the service's processes: everything
below `inferpipe up`, the embedded Valkey included. The client that makes the load is not below it,
so its own cost is never in a figure.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from loadtests.http_client import Connection
from tests.e2e.conftest import API_KEY, Service, start_service, stop_service
from tests.support.tiny_model import make_tiny_model

# A part of the service, and a word in the command line of its processes; the first that fits.
PARTS = {
    "ingress": ":ingress",
    "executors": ":workflow_executor",
    "router": ":router",
    "engine": ":model_replica",
    "engine core": "VLLM",
    "haproxy": "haproxy",
    "valkey": "valkey-server",
}
REST = "ray and the rest"


@dataclass(frozen=True, slots=True)
class Target:
    """A service that runs; `root` is its first process, where it is known."""

    url: str
    api_key: str
    root: psutil.Process | None = None
    data_dir: Path | None = None

    def connection(self) -> Connection:
        """A new connection with the key in its headers."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None, "a URL names a host"
        key = {"Authorization": f"Bearer {self.api_key}"}
        return Connection(parts.hostname, parts.port or 80, key)

    def cpu_s(self) -> Mapping[str, float]:
        """User and system seconds so far, by part; empty where the processes are not known."""
        spent: defaultdict[str, float] = defaultdict(float)
        for process in self.processes():
            try:
                times = process.cpu_times()
                spent[part_of(process)] += times.user + times.system
            except psutil.NoSuchProcess:
                continue  # Ray's helpers come and go
        return spent

    def processes(self) -> list[psutil.Process]:
        """All processes of the service."""
        if self.root is None:
            return []
        return [self.root, *self.root.children(recursive=True)]


def part_of(process: psutil.Process) -> str:
    """The part of the service that a process belongs to."""
    words = " ".join(process.cmdline()) or process.name()
    return next((part for part, word in PARTS.items() if word in words), REST)


IDLE_LOOKS = 10
IDLE_SHARE = 0.4  # of one core


class CpuMeter:
    """CPU ms per call of the service's processes, and what they take with nothing to do."""

    def __init__(self, target: Target, idle_s: float = 3.0) -> None:
        self._target = target
        self._before: Mapping[str, float] = {}
        self._idle: Mapping[str, float] = {}
        # What follows a start, such as imports, is not what a service takes with nothing to do.
        for _ in range(IDLE_LOOKS):
            self._before = target.cpu_s()
            time.sleep(idle_s)
            after = target.cpu_s()
            self._idle = {part: (s - self._before[part]) / idle_s for part, s in after.items()}
            if sum(self._idle.values()) < IDLE_SHARE:
                break
        self._started_s = time.perf_counter()

    @property
    def idle(self) -> str:
        """The idle share of one core, whole and by part."""
        shares = sorted(self._idle.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{part} {100 * share:.1f}" for part, share in shares if share >= 0.001)
        return f"idle: {100 * sum(self._idle.values()):.0f} % of a core ({parts})"

    def start(self) -> None:
        """Begin a span."""
        self._before = self._target.cpu_s()
        self._started_s = time.perf_counter()

    def per_call_ms(self, count: int) -> "CallCpu":
        """What the calls since `start` took each."""
        after, seconds = self._target.cpu_s(), time.perf_counter() - self._started_s
        spent = {part: 1000 * (s - self._before.get(part, 0.0)) for part, s in after.items()}
        calls = max(1, count)
        idle = {part: 1000 * seconds * share for part, share in self._idle.items()}
        parts = {part: (ms - idle.get(part, 0.0)) / calls for part, ms in spent.items()}
        return CallCpu(sum(spent.values()) / calls, sum(parts.values()), parts)


@dataclass(frozen=True, slots=True)
class CallCpu:
    """CPU ms of one call: all that was spent, less the idle share, and that by part."""

    gross_ms: float
    net_ms: float
    parts_ms: Mapping[str, float]


def middle_parts(calls: Sequence[CallCpu]) -> str:
    """The parts' medians over several spans, dearest first."""
    names = {name for call in calls for name in call.parts_ms}
    middle = {
        name: statistics.median(call.parts_ms.get(name, 0.0) for call in calls) for name in names
    }
    shown = sorted(middle.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {ms:.2f}" for name, ms in shown if ms >= 0.005)


@contextmanager
def tiny_service(**settings: str) -> Iterator[Target]:
    """`inferpipe up` with the tiny model in a directory of its own, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="ip-load-") as base:
        model = make_tiny_model(Path(base) / "tiny")
        service = start_service(Path(base) / "data", model, INFERPIPE_MODEL_NAME="tiny", **settings)
        try:
            service.wait_healthy()
            yield target_of(service)
        finally:
            stop_service(service)


def target_of(service: Service) -> Target:
    """The target that a started service is."""
    return Target(service.url, API_KEY, psutil.Process(service.process.pid), service.data_dir)


@contextmanager
def given_or_tiny(arguments: argparse.Namespace) -> Iterator[Target]:
    """The service that `--url` names, or one started for this run."""
    if arguments.url is None:
        with tiny_service() as target:
            yield target
        return
    root = None if arguments.pid is None else psutil.Process(arguments.pid)
    yield Target(arguments.url.rstrip("/"), arguments.api_key, root)


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """`--url`, `--api-key` and `--pid`."""
    parser.add_argument("--url", help="a service that runs; none: one is started")
    parser.add_argument("--api-key", default="", help="its key")
    parser.add_argument("--pid", type=int, help="its `inferpipe up` process, for CPU figures")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range, as the tables show them."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def machine() -> str:
    """The machine in a line."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), "")
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{psutil.cpu_count()} x {model or platform.machine()}, {memory_gib:.0f} GiB, "
        f"Python {platform.python_version()}"
    )


def execute_body(workflow_id: str, value: object) -> bytes:
    """The body of the three `execute` routes."""
    return json.dumps({"workflowId": workflow_id, "input": value}).encode()

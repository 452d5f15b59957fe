"""One running service whose processes the chaos tests kill, and how to look behind its API.

Engine and model are those of the end-to-end tests; the workflows are our own.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from tests.e2e.conftest import API_KEY, Service, start_service, stop_service
from tests.support.checker import TERMINAL_KINDS, Entry, entries_of_stream, journal_problems
from tests.support.sse import events_of
from tests.support.tiny_model import make_tiny_model

EXECUTORS = "workflow_executor"
PROMPT = "Tell {{ input.topic }} of the sea, the moon and an old clock in a tower, part"
LONG_STEPS = 10
TERMINAL_STATUSES = frozenset({"completed", "failed", "cancelled"})


def generate(step_id: str, max_tokens: int, settings: str = "temperature: 0") -> str:
    return (
        f"  - id: {step_id}\n    generate: "
        f'{{prompt: "{PROMPT} {step_id}", max_tokens: {max_tokens}, {settings}}}\n'
    )


WORKFLOWS = {
    "story": "".join(generate(step_id, 60) for step_id in ("one", "two", "three")),
    "dice": generate("one", 250, "temperature: 1, seed: 11"),
    "form": generate(
        "one",
        400,
        "temperature: 0, output_schema: {type: array, minItems: 20, maxItems: 20, "
        "items: {type: string, minLength: 5, maxLength: 9}}",
    ),
    "saga": "".join(generate(f"s{number}", 400) for number in range(LONG_STEPS)),
    # Three tokens are no JSON: every attempt fails, and it is parked between them.
    "stubborn": (
        '  - id: never\n    generate: {prompt: "x", max_tokens: 3, temperature: 0, output_schema: '
        "{type: array, minItems: 9, items: {type: string, minLength: 9}}}\n"
    ),
}


@dataclass
class Cluster:
    """The service under test; `service` changes when it is started again."""

    base: Path
    model: Path
    workflows: Path
    settings: dict[str, str] = field(default_factory=dict)
    service: Service = field(init=False)

    def start(self) -> None:
        self.service = start_service(
            self.base / "data",
            self.model,
            INFERPIPE_MODEL_NAME="tiny",
            INFERPIPE_EGRESS_ALLOW="127.0.0.1/32",
            INFERPIPE_WEBHOOK_RETRY_S="0.5,1,1,1,2,2,2,2,4,4,4,4,4,4,4,4",
            INFERPIPE_DTYPE="float32",  # so that greedy answers repeat, whatever else is running
            INFERPIPE_WORKFLOWS_DIR=str(self.workflows),
            **self.settings,
        )

    def stop(self) -> int:
        return stop_service(self.service)

    def connect(self) -> httpx.AsyncClient:
        """A client for any number of streams at once."""
        return httpx.AsyncClient(
            base_url=self.service.url,
            headers={"Authorization": f"Bearer {API_KEY}"},
            timeout=30,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def endpoint(self) -> dict[str, Any]:
        path = self.base / "data" / "valkey" / "endpoint.json"
        return dict(json.loads(path.read_text()))

    def journal(self, execution_id: str) -> list[Entry]:
        """All events, read past the API."""
        with redis.Redis.from_url(self.endpoint()["url"]) as client:
            rows = client.xrange(f"{partition(execution_id)}:j:{execution_id}")
            if rows and not rows[0][1][b"d"]:  # it stands in the snapshot
                snapshot = f"{partition(execution_id)}:s:{execution_id}"
                rows[0][1][b"d"] = client.hget(snapshot, "created")
            return entries_of_stream(rows)

    def check(self, *execution_ids: str) -> list[list[Entry]]:
        """Judge the journals of executions that have ended, and return them."""
        journals = [self.journal(execution_id) for execution_id in execution_ids]
        wrong = {
            execution_id: problems
            for execution_id, journal in zip(execution_ids, journals, strict=True)
            if (problems := journal_problems(journal))
        }
        assert wrong == {}
        return journals

    def owner_pid(self, execution_id: str, ports: dict[int, int] | None = None) -> int | None:
        """The executor process that owns an execution now; with `ports` found before, at once."""
        with redis.Redis.from_url(self.endpoint()["url"]) as client:
            token = client.hget(f"{partition(execution_id)}:s:{execution_id}", "owner")
        port = int(token.decode().partition("~")[0].rpartition(":")[2]) if token else 0
        return (ports or self.executor_ports()).get(port)

    def executor_ports(self) -> dict[int, int]:
        """The pid of each live executor, by the ports it listens on."""
        found = {}
        for pid in self.service.replica_pids(EXECUTORS):
            try:
                for connection in psutil.Process(pid).net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found[connection.laddr.port] = pid
            except psutil.NoSuchProcess:
                continue
        return found

    def log_records(self, name: str) -> list[dict[str, Any]]:
        text = (self.base / "data" / "logs" / f"{name}.log").read_text(errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def partition(execution_id: str) -> str:
    return f"ip:{{{int(execution_id[4:6], 16)}}}"


def prepare_cluster(base: Path, **settings: str) -> Cluster:
    """A service with the tiny model and our workflows, not started yet."""
    workflows = base / "workflows"
    workflows.mkdir()
    for name, steps in WORKFLOWS.items():
        (workflows / f"{name}.yaml").write_text(f"id: {name}\nsteps:\n{steps}")
    return Cluster(base, make_tiny_model(base / "tiny"), workflows, settings)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = prepare_cluster(tmp_path_factory.mktemp("chaos"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The service, healed from the last test."""
    running.service.wait_healthy(120)
    return running


@pytest.fixture
async def http(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with cluster.connect() as client:
        yield client


@dataclass
class Reading:
    """What one reader was shown over all its connections."""

    execution_id: str
    view: list[Entry] = field(default_factory=list)
    cut_count: int = 0  # by the reader itself
    broken_count: int = 0  # by the other side
    refused_count: int = 0
    gap_count: int = 0

    @property
    def cursor(self) -> int:
        return self.view[-1].seq if self.view else 0


async def start(http: httpx.AsyncClient, workflow_id: str, **members: Any) -> str:
    """Start an execution; its id."""
    body = {"workflowId": workflow_id, "input": {"topic": "a child"}, **members}
    answer = await http.post("/v1/execute/async", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def follow(
    http: httpx.AsyncClient,
    reading: Reading,
    *,
    within_s: float = 100,
    seen: Callable[[Entry], bool] = lambda _: False,
) -> Reading:
    """Read an execution's stream to its end, resuming whenever it breaks.

    `seen` is shown every event as it comes, and cuts the connection when it answers true.
    """
    async with asyncio.timeout(within_s):
        while not await _read_once(http, reading, seen):
            await asyncio.sleep(0.1)
    return reading


async def _read_once(
    http: httpx.AsyncClient, reading: Reading, seen: Callable[[Entry], bool]
) -> bool:
    """Whether the end was reached."""
    headers = {"Last-Event-ID": str(reading.cursor)} if reading.cursor else {}
    path = f"/v1/executions/{reading.execution_id}/stream"
    try:
        async with http.stream("GET", path, headers=headers) as answer:
            if answer.status_code != 200:
                reading.refused_count += 1
                return answer.status_code == 204
            async with aclosing(events_of(answer)) as events:
                async for entry in events:
                    if entry.kind == "gap":
                        reading.gap_count += 1
                        continue
                    reading.view.append(entry)
                    is_cut = seen(entry)
                    if entry.kind in TERMINAL_KINDS:
                        return True
                    if is_cut:
                        reading.cut_count += 1
                        return False
        reading.broken_count += 1  # it ended without a terminal event
    except httpx.TransportError:
        reading.broken_count += 1
    return False


async def ended(
    http: httpx.AsyncClient, execution_ids: Sequence[str], within_s: float = 60
) -> list[dict[str, Any]]:
    """Wait until all have ended; their records."""
    records: dict[str, dict[str, Any]] = {}
    async with asyncio.timeout(within_s):
        while missing := [one for one in execution_ids if one not in records]:
            for execution_id in missing:
                answer = await http.get(f"/v1/executions/{execution_id}")
                if answer.status_code == 200 and answer.json()["status"] in TERMINAL_STATUSES:
                    records[execution_id] = answer.json()
            await asyncio.sleep(0.05)
    return [records[execution_id] for execution_id in execution_ids]


def kill(pid: int) -> float:
    """End a process without a word; when, in monotonic seconds."""
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def spread(values: Sequence[float], unit: str) -> str:
    """p50, p99 and the largest, by nearest rank."""
    ordered = sorted(values)
    p50, p99 = (ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 99))
    return f"n {len(ordered)}  p50 {p50:.3f}  p99 {p99:.3f}  max {ordered[-1]:.3f} {unit}"


def show(title: str, figures: dict[str, object]) -> None:
    """The figures of a test, for whoever runs it with `-s`."""
    width = max(map(len, figures))
    lines = [f"    {name:<{width}}  {value}" for name, value in figures.items()]
    print("\n  " + "\n".join([title, *lines]))

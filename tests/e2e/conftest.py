"""One running service for all end-to-end tests: `inferpipe up`, as a user starts it.

The engine is vLLM with the bundled SmolLM2-135M-Instruct, so the quick start itself is what is
tested. Its weights are converted once and kept beside the checkout.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import redis

READY_WITHIN_S = 240
API_KEY = "ip_e2e-test-key-0123456789"


@dataclass
class Service:
    """A service that runs as a child of the test session."""

    url: str
    port: int
    data_dir: Path
    process: subprocess.Popen[bytes]
    log: Path

    def replica_pids(self, deployment: str) -> list[int]:
        """The processes of a deployment, oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if f"ServeReplica:inferpipe:{deployment}" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return [child.pid for child in sorted(found, key=lambda child: child.create_time())]

    @contextmanager
    def watch_new_executions(self) -> Iterator[Callable[[], list[str]]]:
        """Ids that the store has gained since; read past the API, which has no list yet."""
        url = json.loads((self.data_dir / "valkey" / "endpoint.json").read_text())["url"]
        client = redis.Redis.from_url(url)

        def ids() -> set[str]:
            keys = client.scan_iter("ip:*:s:exe_*", count=1000)
            return {key.decode().rpartition(":")[2] for key in keys}

        before = ids()
        yield lambda: sorted(ids() - before)
        client.close()

    def health(self) -> dict[str, object]:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/health", timeout=5) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    def wait_healthy(self, within_s: float = 60, *, workers: int = 2) -> None:
        """Wait until everything is up; the health route is the event, once a second."""
        give_up = time.monotonic() + within_s
        health: object = None
        while time.monotonic() < give_up:
            try:
                health = self.health()
            except OSError as error:
                health = error
            else:
                engine = dict(health["services"]).get("workflow_engine", {})  # type: ignore[call-overload]
                if health["status"] == "healthy" and engine.get("workers", 0) >= workers:
                    return
            time.sleep(0.2)
        raise AssertionError(f"not healthy within {within_s} s: {health}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_service(data_dir: Path, model: Path | None, **settings: str) -> Service:
    """Start `inferpipe up` and wait until it says that it is ready."""
    port = free_port()
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "up.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("INFERPIPE_")},
        "INFERPIPE_PORT": str(port),
        "INFERPIPE_DATA_DIR": str(data_dir),
        "INFERPIPE_API_KEY": API_KEY,
        **({"INFERPIPE_MODEL": str(model)} if model else {}),
        **settings,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "inferpipe.cli", "up"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(f"http://127.0.0.1:{port}", port, data_dir, process, log)
    give_up = time.monotonic() + READY_WITHIN_S
    while not re.search(rb"^ready after", log.read_bytes(), re.MULTILINE):
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            raise AssertionError(f"inferpipe up failed:\n{log.read_text()}")
        time.sleep(0.1)
    return service


def stop_service(service: Service, within_s: float = 60) -> int:
    """End it as Ctrl-C does; its exit status."""
    if service.process.poll() is None:
        service.process.send_signal(signal.SIGINT)
    try:
        return service.process.wait(within_s)
    finally:
        if service.process.poll() is None:
            os.killpg(service.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("e2e") / "data"
    data_dir.mkdir()
    kept = Path(__file__).parents[2] / ".models"
    kept.mkdir(exist_ok=True)
    (data_dir / "models").symlink_to(kept, target_is_directory=True)
    running = start_service(data_dir, None, INFERPIPE_EGRESS_ALLOW="127.0.0.1/32")
    running.wait_healthy()
    yield running
    stop_service(running)

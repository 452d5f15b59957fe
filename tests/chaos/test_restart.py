"""`inferpipe up` ended by Ctrl-C in the middle of work, and started again on the same data."""

import asyncio
import re
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.conftest import Cluster, ended, show, start

TEMP_DIR = re.compile(r"/tmp/ip-[\w-]+")
pytestmark = pytest.mark.timeout(400)


class Traces:
    """All that a running service has outside of its data directory."""

    def __init__(self, cluster: Cluster) -> None:
        up = psutil.Process(cluster.service.process.pid)
        self.processes = [up, *up.children(recursive=True)]
        self.ports: set[int] = set()
        self.paths: set[Path] = set()
        for process in self.processes:
            try:
                self._note(process, cluster.base)
            except psutil.NoSuchProcess:
                continue

    def _note(self, process: psutil.Process, base: Path) -> None:
        for name in TEMP_DIR.findall(" ".join(process.cmdline())):
            self.paths.add(Path(name))
        for connection in process.net_connections("all"):
            if isinstance(connection.laddr, str) and connection.laddr.startswith("/"):
                self.paths.add(Path(connection.laddr))
            elif connection.status == psutil.CONN_LISTEN:
                self.ports.add(connection.laddr.port)
        for file in process.open_files():
            if not Path(file.path).is_relative_to(base):
                self.paths.add(Path(file.path))

    def left(self) -> dict[str, list[str]]:
        """What of it is still there."""
        listening = {
            connection.laddr.port
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        return {
            "processes": [str(process) for process in self.processes if process.is_running()],
            "ports": [str(port) for port in sorted(self.ports & listening)],
            "files": [str(path) for path in sorted(self.paths) if path.exists()],
        }


async def test_a_restart_finds_every_execution(cluster: Cluster) -> None:
    retry = {"attempts": 4, "backoff": "exponential"}
    async with cluster.connect() as http:
        running = [await start(http, "saga") for _ in range(5)]
        parked = [await start(http, "stubborn", retryConfig=retry) for _ in range(5)]
        await until_parked(http, parked)
        before = [await status(http, execution_id) for execution_id in running + parked]
    assert before == ["running"] * 5 + ["waiting"] * 5
    traces = Traces(cluster)
    code = await asyncio.to_thread(cluster.stop)
    left = traces.left()
    await asyncio.to_thread(cluster.start)
    await asyncio.to_thread(cluster.service.wait_healthy)
    async with cluster.connect() as http:
        records = await ended(http, running + parked, within_s=120)
    cluster.check(*running, *parked)
    endings = [(record["status"], record["attempts"]) for record in records]
    show(
        "Ctrl-C with 5 running and 5 parked executions, and a start on the same data",
        {
            "exit status": code,
            "processes ended": len(traces.processes),
            "ports, files and sockets seen": f"{len(traces.ports)}, {len(traces.paths)}",
            "left behind": left,
            "running ones ended as": sorted(set(endings[:5])),
            "parked ones ended as": sorted(set(endings[5:])),
        },
    )
    assert code == 0
    assert endings == [("completed", 1)] * 5 + [("failed", 5)] * 5
    assert left == {"processes": [], "ports": [], "files": []}


async def status(http: httpx.AsyncClient, execution_id: str) -> str:
    return str((await http.get(f"/v1/executions/{execution_id}")).json()["status"])


async def until_parked(http: httpx.AsyncClient, execution_ids: list[str]) -> None:
    """Wait until each has failed twice and waits for seconds: long enough to be stopped so."""
    async with asyncio.timeout(30):
        for execution_id in execution_ids:
            while True:
                record = (await http.get(f"/v1/executions/{execution_id}")).json()
                if record["status"] == "waiting" and record["attempts"] >= 4:
                    break
                await asyncio.sleep(0.05)

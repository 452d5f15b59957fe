"""A pulse between workers: an open connection that breaks when the process at its end dies.

Owns one listening socket and one connection to each peer. Nothing is sent over it but the caller's
id, so that a worker is watched from the moment it has found the others, and not only when they have
found it. The kernel closes a killed process's sockets at once, so a peer knows within milliseconds
what a lease would tell it in seconds. Invariant: this is a hint. A connection can break for other
reasons, so the address is tried once more, and the fence makes a wrong hint safe.
"""

import asyncio
import logging
from collections.abc import Collection
from typing import Any

from serve_app.ports import Clock

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 256  # more peers than any cluster has executors
GREETING_BYTES_MAX = 256  # of a worker's id and the end of its line
_CONNECT_TIMEOUT_S = 1.0
_SECOND_LOOK_S = 0.02


class TcpPeers:
    """The pulse of this worker, and those it feels; set `worker_id` once it is known."""

    def __init__(self, host: str, clock: Clock) -> None:
        self._host = host
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._watched: set[str] = set()
        self._greeted: asyncio.Queue[str] = asyncio.Queue(CONNECTIONS_MAX)
        self.worker_id = ""

    async def listen(self) -> int:
        """Open the socket that peers connect to; its port."""
        self._server = await asyncio.start_server(
            self._accept, self._host, 0, limit=GREETING_BYTES_MAX
        )
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def greeted(self) -> str:
        """Wait for a peer that has begun to feel our pulse; its id."""
        return await self._greeted.get()

    def unwatched(self, peers: Collection[str]) -> tuple[str, ...]:
        """The peers that nobody watches yet; from now on they count as watched."""
        new = tuple(peer for peer in peers if peer not in self._watched)
        self._watched.update(new)
        return new

    async def is_lost(self, peer: str) -> bool:
        """Wait until the connection to a peer breaks; whether its socket is gone too."""
        try:
            while await self._is_reachable(peer):
                await self._clock.sleep(_SECOND_LOOK_S)
        finally:
            self._watched.discard(peer)
        return True

    async def close(self) -> None:
        """Close every connection; peers see it, and find the leases handed over."""
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._writers):
            writer.close()

    async def _is_reachable(self, peer: str) -> bool:
        """Hold a connection until it breaks; False when none can be made."""
        host, _, port = peer.partition("~")[0].rpartition(":")
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError, ValueError):
            return False
        try:
            writer.write(f"{self.worker_id}\n".encode())
            await reader.read()
        except OSError:
            logger.info("the connection to %s broke", peer)
        finally:
            writer.close()
        return True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._writers.add(writer)
        try:
            await self._hear_greeting(reader, writer.get_extra_info("peername"))
            await reader.read(1)
        except (OSError, ValueError):
            return  # broken, or no worker's words
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _hear_greeting(self, reader: asyncio.StreamReader, peername: Any) -> None:
        """Take the id that a peer says, if it is one of its own address."""
        worker_id = (await reader.readline()).decode().strip()
        host = worker_id.partition("~")[0].rpartition(":")[0]
        is_its_own = bool(peername) and host == peername[0]
        if is_its_own and not self._greeted.full():  # else its next heartbeat tells of it
            self._greeted.put_nowait(worker_id)

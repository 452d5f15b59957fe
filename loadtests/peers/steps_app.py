"""The server that our `http` steps ask: it is the user's code, as the peers' step functions are.

Runs in the product's environment. One connection does one request at a time; a connection that is
closed while its step runs has stopped the step.
"""

import asyncio
import sys
from typing import cast

import uvloop

from loadtests.peers.work import Work, notes_here, run_step

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n"


class StepConnection(asyncio.Protocol):
    """`GET /<step>/<ms>/<watched or ->`."""

    notes = notes_here()

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._running: asyncio.Task[None] | None = None
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.WriteTransport", transport)  # of TCP

    def data_received(self, data: bytes) -> None:
        """Run the step that a whole request names."""
        self._head += data
        if not self._head.endswith(b"\r\n\r\n"):
            return
        target = self._head.split(b" ", 2)[1].decode()
        self._head = b""
        step, ms, watched = target.strip("/").split("/")
        work = Work(int(ms), watched.strip("-"))
        self._running = asyncio.get_running_loop().create_task(self._answer(work, int(step)))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        """Nobody waits: stop."""
        if self._running is not None:
            self._running.cancel()

    async def _answer(self, work: Work, step: int) -> None:
        done = await run_step(self.notes, work, step)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(ANSWER + str(done).encode())


async def main() -> None:
    """Serve on the port given."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(StepConnection, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())

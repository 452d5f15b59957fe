"""A small HTTP server on loopback that answers as a test wants, byte by byte if need be."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Answer = Callable[["Got", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Got:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """What came, and where it listens. `answer` may be changed while it runs."""

    answer: Answer
    port: int = 0
    host: str = "127.0.0.1"
    scheme: str = "http"
    got: list[Got] = field(default_factory=list)
    connections: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/hook"

    async def wait_for(self, count: int) -> list[Got]:
        """Wait until so many requests have come."""
        while len(self.got) < count:
            self.arrived.clear()
            await self.arrived.wait()
        return self.got

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (got := await _read(reader)) is not None:
                self.got.append(got)
                self.arrived.set()
                await self.answer(got, writer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Got | None:
    line = await reader.readline()
    if not line:
        return None
    method, path, _ = line.decode().split(" ", 2)
    headers: dict[str, str] = {}
    while (line := (await reader.readline()).strip()) != b"":
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Got(method, path, headers, body)


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    """Always the same answer; underscores in header names become dashes."""
    lines = [f"HTTP/1.1 {code} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    data = "\r\n".join([*lines, "", ""]).encode() + body

    async def answer(got: Got, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


async def hang(got: Got, writer: asyncio.StreamWriter) -> None:
    """Never answer; ends when the other side goes."""
    while not writer.is_closing():
        await asyncio.sleep(0.05)


async def drip(got: Got, writer: asyncio.StreamWriter) -> None:
    """A good status, then a byte now and then, for ever."""
    writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 100000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


@asynccontextmanager
async def receiver(
    answer: Answer, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """Run one on loopback."""
    running = Receiver(answer, host=host, scheme="https" if tls else "http")
    server = await asyncio.start_server(running.serve, host, 0, ssl=tls)
    running.port = server.sockets[0].getsockname()[1]
    try:
        yield running
    finally:
        server.close()

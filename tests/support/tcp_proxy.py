"""A TCP proxy that can cut and delay: the network between us and a server, at a test's mercy."""

import asyncio
import ssl
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

READ_BYTES = 65_536
SILENCE_LOOK_S = 0.02


class TcpProxy:
    """Forwards connections to one address.

    Args:
        delay_s: added to everything that passes, each way; may be changed at any time.
        tls: what clients must speak; what is behind gets it in plain. Set it before it begins.
        is_refusing: new connections are closed at once; may be changed at any time.
        is_silent: nothing passes and nobody is told, as on a half-open connection; likewise.
    """

    def __init__(self, host: str, port: int) -> None:
        self.delay_s = 0.0
        self.is_refusing = False
        self.is_silent = False
        self.cut_count = 0
        self.refused_count = 0
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @classmethod
    def before(cls, url: str) -> "TcpProxy":
        """A proxy before the server that a URL names."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port)

    def url(self, url: str) -> str:
        """The URL, by way of this proxy."""
        parts = urlsplit(url)
        netloc = f"{parts.netloc.rpartition(':')[0]}:{self.port}"
        return urlunsplit(parts._replace(netloc=netloc))

    def cut(self) -> int:
        """Break every connection off, in both directions; how many."""
        links = [writers for writers in self._links.values() if writers]
        for writers in links:
            for writer in writers:
                writer.transport.abort()
        self.cut_count += len(links)
        return len(links)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        writers = self._links[task] = [writer]
        try:
            if self.is_refusing:
                self.refused_count += 1
                return
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except OSError:
            return  # the far end is gone: so is this one
        finally:
            for one in writers:
                one.transport.abort()
            del self._links[task]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(READ_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                while self.is_silent:
                    await asyncio.sleep(SILENCE_LOOK_S)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # cut
        finally:
            writer.transport.abort()  # whichever end goes, the other one goes with it

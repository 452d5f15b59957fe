"""A small keep-alive HTTP/1.1 client for load: one connection per caller, no parsing to spare.

Reads a status line, headers and a body of known length or in chunks; that is all these servers
answer here. It shares the machine with what it measures, so it must cost little itself.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

STREAM_END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Timings:
    """What one closed loop measured; times in ms."""

    per_second: float
    p50_ms: float
    p99_ms: float
    count: int
    error_count: int


class Connection:
    """One keep-alive connection."""

    def __init__(self, host: str, port: int, headers: Mapping[str, str] | None = None) -> None:
        self._address = host, port
        named = {"Host": f"{host}:{port}", "Content-Type": "application/json", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Send one request; status and body, chunk borders included where it comes in chunks."""
        reader, status, head = await self._send(method, path, body)
        at = head.find(b"content-length:")
        if at < 0:
            return status, b"".join([part async for part in _until_end(reader)])
        length = int(head[at + 15 : head.index(b"\r", at)])
        return status, await reader.readexactly(length)

    async def stream(
        self, path: str, body: bytes, received: Callable[[bytes], None]
    ) -> tuple[int, bytes]:
        """Post, hand out what comes as it comes, chunk borders included; status and all of it."""
        reader, status, _ = await self._send("POST", path, body)
        parts: list[bytes] = []
        async for part in _until_end(reader):
            received(part)
            parts.append(part)
        return status, b"".join(parts)

    def close(self) -> None:
        """Close it."""
        if self._writer is not None:
            self._writer.close()

    async def _send(
        self, method: str, path: str, body: bytes
    ) -> tuple[asyncio.StreamReader, int, bytes]:
        """Send; where the body is read, the status, and the head in lower case."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        assert self._reader is not None, "opened together with the writer"
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        return self._reader, int(answer[9:12]), answer.lower()


async def _until_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    tail = b""
    while not tail.endswith(STREAM_END):
        part = await reader.read(1 << 16)
        if not part:
            raise ConnectionError("the answer was cut off")
        yield part
        tail = (tail + part)[-len(STREAM_END) :]


async def closed_loop(
    concurrency: int, seconds: float, call: Callable[[int], Awaitable[bool]]
) -> Timings:
    """Call without pause from `concurrency` callers; `call(caller)` says whether it went well."""
    latencies: list[float] = []
    errors = 0
    begin = time.perf_counter()

    async def caller(number: int) -> None:
        nonlocal errors
        while time.perf_counter() - begin < seconds:
            started = time.perf_counter()
            if await call(number):
                latencies.append(time.perf_counter() - started)
            else:
                errors += 1

    await asyncio.gather(*(caller(number) for number in range(concurrency)))
    took = time.perf_counter() - begin
    return Timings(
        per_second=len(latencies) / took,
        p50_ms=1000 * percentile(latencies, 0.5),
        p99_ms=1000 * percentile(latencies, 0.99),
        count=len(latencies),
        error_count=errors,
    )


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all are not above; NaN for none."""
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]

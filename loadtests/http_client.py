"""A small keep-alive HTTP/1.1 client for load: one connection per caller, no parsing to spare.

Reads a status line, headers and a body of known length; that is all these servers answer here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """What one closed loop measured; times in ms."""

    per_second: float
    p50_ms: float
    p99_ms: float
    error_count: int


class Connection:
    """One keep-alive connection."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Send one request; status and body."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        assert self._reader is not None
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        lower = answer.lower()
        at = lower.index(b"content-length:") + 15
        length = int(lower[at : lower.index(b"\r", at)])
        return int(answer[9:12]), await self._reader.readexactly(length)

    def close(self) -> None:
        """Close it."""
        if self._writer is not None:
            self._writer.close()


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
    latencies.sort()
    return Timings(
        per_second=len(latencies) / took,
        p50_ms=1000 * latencies[len(latencies) // 2],
        p99_ms=1000 * latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))],
        error_count=errors,
    )

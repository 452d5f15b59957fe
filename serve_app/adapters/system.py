"""The machine's own clock and chance.

Owns the only calls to the system clock, to sleep and to the random source in the server; everyone
else is handed `ports.Clock` and `ports.Entropy`. Invariant: no state, so that one instance of each
serves a whole process, threads and forks included.
"""

import asyncio
import secrets
import time

_CHANCE = secrets.SystemRandom()  # the kernel's: nothing to seed, nothing that a fork repeats


class SystemClock:
    """`ports.Clock` by the operating system."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Seconds of a clock that never goes back."""
        return time.monotonic()

    async def sleep(self, delay_s: float) -> None:
        """Wait; zero or less gives the other tasks one turn."""
        await asyncio.sleep(delay_s)


class SystemEntropy:
    """`ports.Entropy` by the operating system."""

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return _CHANCE.random()

    def token(self) -> str:
        """22 URL-safe characters that nobody can guess (128 bits)."""
        return secrets.token_urlsafe(16)

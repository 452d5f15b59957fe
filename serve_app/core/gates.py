"""What an execution passes before it starts: a cached result, a concurrency slot.

Owns what a gate is and its name; `gate_messages` has what is said to it, and its state is the
store's (`redis_gates.lua`). Invariant: a gate's name is derived from what it guards, so everybody
who starts the same thing meets at the same gate.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What the last gate of a route answers: run, take this result, or the line was full."""

    PASSED = "passed"
    HIT = "hit"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate of a route.

    Args:
        name: 32 hex digits; says in which partition the gate lives.
        limit: executions inside at once.
        ttl_ms: how long a result is kept and shared; None: this gate keeps none.
        waiting_max: executions in line; beyond it an execution is refused.
    """

    name: str
    limit: int
    waiting_max: int
    ttl_ms: int | None = None

    def partition(self, partition_count: int) -> int:
        """Where it lives."""
        return partition_of_name(self.name, partition_count)


@dataclass(frozen=True, slots=True)
class Rate:
    """At most so many in any window, evenly refilled: starts, or tokens; `name` as of a gate."""

    name: str
    count_max: int
    window_ms: int


@dataclass(frozen=True, slots=True)
class TokenShare:
    """What an execution took from a rate of tokens before it ran; persisted.

    Args:
        name, tokens, window_ms: of the rate.
        reserved: tokens, for what its model steps may write; given back as its own are counted.
        at_ms: from when on they count.
    """

    name: str
    tokens: int
    window_ms: int
    reserved: int
    at_ms: int

    def left_at(self, now_ms: int) -> int:
        """Of the reserved tokens, those that have not been refilled since, to the nearest."""
        passed_ms = min(max(0, now_ms - self.at_ms), self.window_ms)
        return round(self.reserved * (self.window_ms - passed_ms) / self.window_ms)


def gate_name(*parts: str) -> str:
    """The name that the same parts always give."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def partition_of_name(name: str, partition_count: int) -> int:
    """Where the gate or rate of this name lives."""
    return int(name[:8], 16) % partition_count

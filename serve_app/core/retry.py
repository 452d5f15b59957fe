"""When to try again: a policy and the delay before the next try. Pure; jitter comes in."""

from dataclasses import dataclass
from enum import StrEnum


class Backoff(StrEnum):
    """How the delay grows."""

    FIXED = "fixed"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Tries after the first, and how long to wait before each."""

    attempts: int = 0
    backoff: Backoff = Backoff.EXPONENTIAL
    max_delay_ms: int = 30_000
    initial_delay_ms: int = 1_000


JITTER = 0.2


def retry_delay_ms(policy: RetryPolicy, failed_attempt: int, jitter: float) -> int | None:
    """The delay before the next try; None when none is left."""
    if failed_attempt > policy.attempts:
        return None
    if policy.backoff is Backoff.FIXED:
        return policy.initial_delay_ms
    doublings = min(failed_attempt - 1, 40)
    delay_ms = policy.initial_delay_ms * 2**doublings * (1 - JITTER + 2 * JITTER * jitter)
    return min(round(delay_ms), policy.max_delay_ms)

"""When a failed attempt is tried again: a policy and one pure function.

Owns the arithmetic of delays. Does not own counting, clocks or chance: the caller hands in the
number of the failed attempt and a draw. Invariant: the delay never exceeds `max_delay_ms`, however
many attempts there were.
"""

from dataclasses import dataclass
from enum import StrEnum

JITTER_SHARE = 0.2  # ±20 %: spreads tries that failed together, and keeps doubling recognisable
DOUBLINGS_MAX = 40  # 2**40 s is beyond every maxDelay; more only makes the integer larger


class Backoff(StrEnum):
    """How the delay grows from one attempt to the next."""

    FIXED = "fixed"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how fast to try again.

    Args:
        attempts: tries after the first; 0 means none.
        backoff: whether the delay stays or doubles.
        max_delay_ms: upper bound of each delay, jitter included.
        initial_delay_ms: delay after the first failed attempt.
    """

    attempts: int = 0
    backoff: Backoff = Backoff.EXPONENTIAL
    max_delay_ms: int = 30_000
    initial_delay_ms: int = 1_000


def retry_delay_ms(policy: RetryPolicy, failed_attempt: int, jitter: float) -> int | None:
    """Return how long to wait before the next attempt, or None when no tries are left.

    Args:
        policy: the policy in force.
        failed_attempt: 1-based number of the attempt that has just failed.
        jitter: in [0, 1), drawn by the caller from ports.Entropy; 0.5 is the plain delay. A fixed
            backoff does not use it.
    """
    if failed_attempt > policy.attempts:
        return None
    if policy.backoff is Backoff.FIXED:
        return min(policy.initial_delay_ms, policy.max_delay_ms)
    doublings = min(max(failed_attempt - 1, 0), DOUBLINGS_MAX)
    # Capped before the jitter too, so that late attempts still spread out below the bound.
    delay_ms = min(policy.initial_delay_ms << doublings, policy.max_delay_ms)
    spread = 1 - JITTER_SHARE + 2 * JITTER_SHARE * jitter
    return min(round(delay_ms * spread), policy.max_delay_ms)

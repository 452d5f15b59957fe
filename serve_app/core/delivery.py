"""One event on its way to one endpoint: what an answer means and when to try again.

Owns the schedule, the meaning of outcomes, the pause of an ill endpoint and when it is given up.
Sends nothing and keeps nothing. Invariant: only a 2xx delivers, and nothing is dropped: what has no
try left is `dead`, which can be seen and replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum

JITTER_SHARE = 0.2  # ±20 %: deliveries that failed together do not come back together
RETRY_AFTER_MAX_MS = 12 * 3600 * 1000  # the longest planned delay; a receiver cannot ask for more
HEALTHY_FAILURES = 9  # in a row; more, and it is paused: no bad luck of one that fails at times
PAUSE_FIRST_MS = 5_000
PAUSE_MAX_MS = 300_000
_DOUBLINGS_MAX = 20
GIVE_UP_FAILURES = 10  # in a row, beside the days: an endpoint that gets an event a week may miss 1
_GONE = 410


class DeliveryStatus(StrEnum):
    """`failed`: a further try is due; `dead`: none is left."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try.

    Args:
        status: of the answer; None: there was none, and `error` says why.
        answer: the first bytes of the answer's body, as text.
    """

    at_ms: int
    status: int | None
    latency_ms: int
    error: str | None
    answer: str = ""

    @property
    def is_success(self) -> bool:
        """Whether it delivered."""
        return self.status is not None and 200 <= self.status < 300  # noqa: PLR2004 - the 2xx


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as its owner sees it."""

    id: str
    webhook_id: str
    workspace: str
    event_id: str
    event_type: str
    status: DeliveryStatus
    attempts: tuple[Attempt, ...]
    next_attempt_at_ms: int | None
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """A delivery to send now, under a lease.

    Args:
        lease: who loses it sends in vain: the store refuses its record.
        tries: tries since it was made or last replayed.
    """

    id: str
    lease: str
    webhook_id: str
    workspace: str
    event_id: str
    event_type: str
    tries: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a delivery after a try.

    Args:
        next_at_ms: of the next try; only with `failed`.
        disable_reason: why its endpoint is to be disabled; None: it is not.
    """

    status: DeliveryStatus
    next_at_ms: int | None = None
    disable_reason: str | None = None


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """Failures in a row, and since when there was nothing else; zero and None when it is well."""

    failures: int = 0
    failing_since_ms: int | None = None


def judge(
    attempt: Attempt,
    tries: int,
    delays_s: Sequence[float],
    retry_after_ms: int | None,
    jitter: float,
) -> Verdict:
    """What follows from a try.

    Args:
        attempt: the try.
        tries: this one included.
        delays_s: the schedule: what to wait after the first, second … failure.
        retry_after_ms: what the receiver asked for, `parse_retry_after`.
        jitter: in [0, 1), drawn by the caller.
    """
    if attempt.is_success:
        return Verdict(DeliveryStatus.DELIVERED)
    if attempt.status == _GONE:
        return Verdict(DeliveryStatus.DEAD, disable_reason="the endpoint answered 410 Gone")
    if tries > len(delays_s):
        return Verdict(DeliveryStatus.DEAD)
    delay_ms = delays_s[tries - 1] * 1000 * (1 - JITTER_SHARE + 2 * JITTER_SHARE * jitter)
    asked_ms = min(retry_after_ms or 0, RETRY_AFTER_MAX_MS)
    ended_ms = attempt.at_ms + attempt.latency_ms
    return Verdict(DeliveryStatus.FAILED, ended_ms + max(round(delay_ms), asked_ms))


def pause_ms(health: EndpointHealth, jitter: float) -> int:
    """How long to leave an endpoint alone that fails again and again; 0: not at all.

    Its deliveries wait meanwhile and lose no try; after the pause one goes first.
    """
    beyond = health.failures - HEALTHY_FAILURES
    if beyond <= 0:
        return 0
    pause = min(PAUSE_FIRST_MS << min(beyond - 1, _DOUBLINGS_MAX), PAUSE_MAX_MS)
    return round(pause * (1 - JITTER_SHARE * jitter))


def is_given_up(health: EndpointHealth, now_ms: int, after_ms: int) -> bool:
    """Whether an endpoint has failed so long and often that it is to be disabled."""
    since_ms = health.failing_since_ms
    return (
        since_ms is not None
        and health.failures >= GIVE_UP_FAILURES
        and now_ms - since_ms >= after_ms
    )


def parse_retry_after(value: str | None, now_ms: int) -> int | None:
    """What a Retry-After header asks for, in ms from now; None where it says nothing usable."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(int(text[:9]) * 1000, RETRY_AFTER_MAX_MS)
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, round(moment.timestamp() * 1000) - now_ms)

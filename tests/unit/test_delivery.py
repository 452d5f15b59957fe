"""What an answer means, when a delivery is tried again, when an endpoint is left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.delivery import (
    GIVE_UP_FAILURES,
    HEALTHY_FAILURES,
    PAUSE_MAX_MS,
    RETRY_AFTER_MAX_MS,
    Attempt,
    DeliveryStatus,
    EndpointHealth,
    Verdict,
    is_given_up,
    judge,
    parse_retry_after,
    pause_ms,
)
from serve_app.settings import Settings

DELAYS_S = Settings().webhook_retry_s
NOW_MS = 1_763_700_000_000
DAY_MS = 86_400_000


def an_attempt(status: int | None = None, latency_ms: int = 100) -> Attempt:
    return Attempt(NOW_MS, status, latency_ms, None if status else "no answer")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
@pytest.mark.parametrize("tries", [1, 5, 9, 100])
def test_any_2xx_delivers(status: int, tries: int) -> None:
    assert judge(an_attempt(status), tries, DELAYS_S, 5000, 0.5) == Verdict(
        DeliveryStatus.DELIVERED
    )


@pytest.mark.parametrize(
    "status", [None, 100, 199, 300, 301, 302, 304, 307, 308, 400, 401, 404, 408, 429, 500, 503, 599]
)
def test_everything_else_is_tried_again(status: int | None) -> None:
    verdict = judge(an_attempt(status), 1, DELAYS_S, None, 0.5)
    assert verdict == Verdict(DeliveryStatus.FAILED, NOW_MS + 100 + 5000)


def test_the_schedule_is_the_documented_one_and_then_the_delivery_is_dead() -> None:
    waits = []
    for tries in range(1, 9):
        verdict = judge(an_attempt(500, 0), tries, DELAYS_S, None, 0.5)
        assert verdict.next_at_ms is not None
        waits.append((verdict.next_at_ms - NOW_MS) / 1000)
    assert waits == [5, 30, 120, 600, 1800, 7200, 21600, 43200]
    assert judge(an_attempt(500), 9, DELAYS_S, None, 0.5) == Verdict(DeliveryStatus.DEAD)
    assert judge(an_attempt(500), 9, DELAYS_S, 1000, 0.5).status is DeliveryStatus.DEAD


@given(st.integers(1, 8), st.floats(0, 1, exclude_max=True), st.integers(0, 10**12))
def test_a_wait_is_within_a_fifth_of_the_plan_or_what_was_asked(
    tries: int, jitter: float, asked_ms: int
) -> None:
    verdict = judge(an_attempt(503, 0), tries, DELAYS_S, asked_ms, jitter)
    assert verdict.next_at_ms is not None
    wait_ms, planned_ms = verdict.next_at_ms - NOW_MS, DELAYS_S[tries - 1] * 1000
    asked_ms = min(asked_ms, RETRY_AFTER_MAX_MS)
    assert wait_ms >= asked_ms
    assert wait_ms == asked_ms or 0.8 * planned_ms - 1 <= wait_ms <= 1.2 * planned_ms + 1


def test_410_ends_the_delivery_and_the_endpoint() -> None:
    verdict = judge(an_attempt(410), 1, DELAYS_S, None, 0.5)
    assert verdict.status is DeliveryStatus.DEAD
    assert verdict.disable_reason


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("0", 0),
        (" 120 ", 120_000),
        ("99999999999999999999", RETRY_AFTER_MAX_MS),
        ("Fri, 21 Nov 2025 04:41:00 GMT", 60_000),
        ("Fri, 21 Nov 2025 04:41:00 -0000", 60_000),
        ("Fri, 21 Nov 2025 04:00:00 GMT", 0),
        ("Fri, 99 Nov 2025 04:41:00 GMT", None),
        ("Fri, 21 Nov 99999999999 04:41:00 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(value: str | None, expected: int | None) -> None:
    assert parse_retry_after(value, NOW_MS) == expected


@given(st.text(max_size=60))
def test_any_retry_after_is_read_or_ignored(value: str) -> None:
    asked = parse_retry_after(value, NOW_MS)
    assert asked is None or asked >= 0


def test_an_endpoint_is_paused_longer_and_longer_and_never_for_ever() -> None:
    pauses = [pause_ms(EndpointHealth(n, NOW_MS), 0) for n in range(HEALTHY_FAILURES + 30)]
    assert pauses[: HEALTHY_FAILURES + 1] == [0] * (HEALTHY_FAILURES + 1)
    ill = pauses[HEALTHY_FAILURES + 1 :]
    assert ill[:3] == [5000, 10_000, 20_000]
    assert ill == sorted(ill)
    assert max(ill) == PAUSE_MAX_MS
    assert pause_ms(EndpointHealth(10**9, NOW_MS), 0.99) < PAUSE_MAX_MS


def test_an_endpoint_is_given_up_after_days_and_several_failures() -> None:
    after_ms = 5 * DAY_MS
    long_ago = NOW_MS - after_ms
    assert is_given_up(EndpointHealth(GIVE_UP_FAILURES, long_ago), NOW_MS, after_ms)
    assert not is_given_up(EndpointHealth(GIVE_UP_FAILURES - 1, long_ago), NOW_MS, after_ms)
    assert not is_given_up(EndpointHealth(GIVE_UP_FAILURES, long_ago + 1), NOW_MS, after_ms)
    assert not is_given_up(EndpointHealth(), NOW_MS, after_ms)

import pytest

from serve_app.core.retry import Backoff, RetryPolicy, retry_delay_ms

MIDDLE = 0.5  # the draw that changes nothing


@pytest.mark.parametrize(
    ("failed_attempt", "delay_ms"), [(1, 1_000), (2, 2_000), (3, 4_000), (6, 30_000), (99, 30_000)]
)
def test_exponential_backoff_doubles_up_to_the_bound(failed_attempt: int, delay_ms: int) -> None:
    assert retry_delay_ms(RetryPolicy(attempts=100), failed_attempt, MIDDLE) == delay_ms


@pytest.mark.parametrize("failed_attempt", [1, 2, 50])
def test_fixed_backoff_stays(failed_attempt: int) -> None:
    policy = RetryPolicy(attempts=50, backoff=Backoff.FIXED)
    assert {retry_delay_ms(policy, failed_attempt, draw) for draw in (0.0, 0.9)} == {1_000}


@pytest.mark.parametrize(("draw", "delay_ms"), [(0.0, 1_600), (0.5, 2_000), (0.999_999, 2_400)])
def test_jitter_moves_an_exponential_delay_by_a_fifth(draw: float, delay_ms: int) -> None:
    assert retry_delay_ms(RetryPolicy(attempts=2), 2, draw) == delay_ms


@pytest.mark.parametrize(
    ("attempts", "failed_attempt", "is_tried"),
    [(0, 1, False), (1, 1, True), (1, 2, False), (2, 2, True), (2, 3, False)],
)
def test_attempts_count_the_tries_after_the_first(
    attempts: int, failed_attempt: int, is_tried: bool
) -> None:
    delay_ms = retry_delay_ms(RetryPolicy(attempts=attempts), failed_attempt, MIDDLE)
    assert (delay_ms is not None) == is_tried


@pytest.mark.parametrize("backoff", list(Backoff))
def test_no_draw_and_no_attempt_exceeds_the_bound(backoff: Backoff) -> None:
    policy = RetryPolicy(attempts=10**9, backoff=backoff, max_delay_ms=700)
    delays = [retry_delay_ms(policy, attempt, 0.999) for attempt in (1, 2, 64, 10**9)]
    assert delays == [700] * 4

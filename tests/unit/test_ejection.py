"""What is held against a replica: stalls, losses, ejection, trial, return."""

import pytest

from serve_app.core.ejection import (
    EJECTION_MAX_MS,
    EJECTION_MIN_MS,
    LOSSES_MAX,
    STALL_MS,
    TRIAL_MS,
    Breaker,
)
from serve_app.core.inference import ReplicaLoad

NOW = 1_000_000


def a_load(step_count: int, running_count: int = 1) -> ReplicaLoad:
    return ReplicaLoad("a", ("m",), "", 1, step_count=step_count, running_count=running_count)


def ejected(now_ms: int = NOW) -> Breaker:
    breaker = Breaker()
    lose(breaker, LOSSES_MAX, now_ms)
    return breaker


def lose(breaker: Breaker, count: int, now_ms: int) -> None:
    for number in range(count):
        breaker.lost(f"{now_ms}-{number}", now_ms)


@pytest.mark.parametrize(("still_ms", "is_stalled"), [(STALL_MS - 1, False), (STALL_MS, True)])
def test_an_engine_that_stands_still_under_work_is_stalled(
    still_ms: int, *, is_stalled: bool
) -> None:
    breaker = Breaker()
    breaker.hear(a_load(7), NOW)
    breaker.hear(a_load(7), NOW + still_ms)
    assert breaker.is_stalled(NOW + still_ms) is is_stalled


def test_an_idle_engine_is_not_stalled_and_a_step_ends_a_stall() -> None:
    breaker = Breaker()
    breaker.hear(a_load(7, 0), NOW)
    breaker.hear(a_load(7, 0), NOW + STALL_MS)
    assert not breaker.is_stalled(NOW + STALL_MS)
    breaker.hear(a_load(7), NOW + 3 * STALL_MS)
    assert breaker.is_stalled(NOW + 3 * STALL_MS)
    breaker.hear(a_load(8), NOW + 3 * STALL_MS + 1)
    assert not breaker.is_stalled(NOW + 3 * STALL_MS + 1)


def test_nobody_is_stalled_before_it_reported() -> None:
    assert not Breaker().is_stalled(NOW)


@pytest.mark.parametrize(("count", "is_shunned"), [(LOSSES_MAX - 1, False), (LOSSES_MAX, True)])
def test_losses_in_a_row_eject(count: int, *, is_shunned: bool) -> None:
    breaker = Breaker()
    lose(breaker, count, NOW)
    assert breaker.is_shunned(NOW) is is_shunned


def test_the_same_loss_told_again_counts_once() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.lost("same", NOW)
    assert breaker.losses == 1


def test_a_first_token_between_losses_forgives() -> None:
    breaker = Breaker()
    lose(breaker, LOSSES_MAX - 1, NOW)
    breaker.began()
    lose(breaker, LOSSES_MAX - 1, NOW + 1)
    assert not breaker.is_shunned(NOW + 1)


def test_after_the_ejection_one_request_is_the_trial() -> None:
    breaker = ejected()
    later = NOW + EJECTION_MIN_MS
    assert breaker.is_shunned(later - 1)
    assert not breaker.is_shunned(later)
    breaker.chosen(later)
    assert breaker.is_shunned(later)
    assert breaker.is_shunned(later + TRIAL_MS - 1)
    assert not breaker.is_shunned(later + TRIAL_MS)
    breaker.began()
    assert not breaker.is_shunned(later)


def test_a_failed_trial_ejects_for_twice_as_long_up_to_a_bound() -> None:
    breaker = ejected()
    now_ms, spans = NOW, []
    for _ in range(7):
        now_ms = breaker.ejected_until_ms
        breaker.chosen(now_ms)
        lose(breaker, 1, now_ms)
        spans.append(breaker.ejected_until_ms - now_ms)
    assert spans[:3] == [2 * EJECTION_MIN_MS, 4 * EJECTION_MIN_MS, 8 * EJECTION_MIN_MS]
    assert spans[-1] == EJECTION_MAX_MS


def test_losses_of_the_ejected_do_not_prolong() -> None:
    breaker = ejected()
    until_ms = breaker.ejected_until_ms
    lose(breaker, 20, NOW + 1)
    assert breaker.ejected_until_ms == until_ms

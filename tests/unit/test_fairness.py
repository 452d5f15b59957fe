"""Fair shares, priorities, bounds, budgets; a heavy tenant does not starve light ones."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.errors import OverloadedError, RateLimitExceededError
from serve_app.core.fairness import MINUTE_MS, TENANTS_MAX, FairQueue, TokenBudgets
from serve_app.core.inference import AdmitRequest

NOW = 1_000_000


def a_request(name: str, tenant: str = "a", priority: int = 0) -> AdmitRequest:
    return AdmitRequest(name, "m", 10, tenant=tenant, priority=priority)


def popped(queue: FairQueue, count: int = 1_000) -> list[str]:
    found = []
    while len(found) < count and (request := queue.pop(lambda _: True)) is not None:
        found.append(request.request_id)
    return found


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue = FairQueue(10, 10)
    for name in "xyz":
        queue.push(a_request(name), 5)
    assert popped(queue) == ["x", "y", "z"]
    assert len(queue) == 0


def test_tenants_share_by_tokens_and_not_by_requests() -> None:
    queue = FairQueue(100, 100)
    for number in range(20):
        queue.push(a_request(f"big{number}", "big"), 40)
        queue.push(a_request(f"small{number}", "small"), 10)
    first = Counter(name[:3] for name in popped(queue, 10))
    assert first == {"big": 2, "sma": 8}


def test_a_light_tenant_does_not_wait_for_a_heavy_ones_queue() -> None:
    queue = FairQueue(1000, 1000)
    for number in range(500):
        queue.push(a_request(f"heavy{number}", "heavy"), 100)
    popped(queue, 50)
    queue.push(a_request("light", "light"), 100)
    assert "light" in popped(queue, 2)


def test_an_idle_tenant_saves_nothing_up() -> None:
    queue = FairQueue(1000, 1000)
    queue.push(a_request("early", "lazy"), 1)
    popped(queue)
    for number in range(100):
        queue.push(a_request(f"busy{number}", "busy"), 10)
    popped(queue, 50)
    for number in range(50):
        queue.push(a_request(f"lazy{number}", "lazy"), 10)
    share = Counter(name[:4] for name in popped(queue, 20))
    assert share == {"busy": 10, "lazy": 10}


def test_work_that_did_not_wait_counts_too() -> None:
    queue = FairQueue(10, 10)
    queue.charge("busy", 1000)
    queue.push(a_request("busy", "busy"), 10)
    queue.push(a_request("calm", "calm"), 10)
    assert popped(queue) == ["calm", "busy"]


def test_an_estimate_is_put_right() -> None:
    queue = FairQueue(10, 10)
    queue.charge("a", 1000)
    queue.charge("b", 500)
    queue.settle("a", -900)  # it stopped early
    queue.settle("nobody", 5)
    for tenant in "ab":
        queue.push(a_request(tenant, tenant), 10)
    # Both stand at the floor or above; a has had less by now.
    assert popped(queue)[0] == "a"


def test_priority_orders_a_tenants_own_requests_alone() -> None:
    queue = FairQueue(10, 10)
    queue.push(a_request("a-late", "a", priority=0), 10)
    queue.push(a_request("a-urgent", "a", priority=-5), 10)
    queue.push(a_request("a-last", "a", priority=3), 10)
    queue.push(a_request("b-first", "b", priority=9), 10)
    assert popped(queue) == ["a-urgent", "b-first", "a-late", "a-last"]


def test_one_that_cannot_run_is_passed_over_but_not_by_its_own() -> None:
    queue = FairQueue(10, 10)
    queue.push(a_request("pinned", "a"), 10)
    queue.push(a_request("a2", "a"), 10)
    queue.push(a_request("b", "b"), 10)
    picked = queue.pop(lambda request: request.request_id != "pinned")
    assert picked is not None
    assert picked.request_id == "b"
    assert queue.pop(lambda request: request.request_id != "pinned") is None
    assert len(queue) == 2


def test_a_request_that_left_is_forgotten() -> None:
    queue = FairQueue(10, 10)
    for name in "xyz":
        queue.push(a_request(name), 5)
    queue.remove(a_request("y"))
    queue.remove(a_request("y"))
    queue.remove(a_request("x", "nobody"))
    assert popped(queue) == ["x", "z"]


def test_the_queue_is_bounded_for_all_and_for_each() -> None:
    queue = FairQueue(size_max=3, tenant_size_max=2)
    queue.push(a_request("1"), 1)
    queue.push(a_request("2"), 1)
    with pytest.raises(RateLimitExceededError):
        queue.push(a_request("3"), 1)
    queue.push(a_request("4", "b"), 1)
    with pytest.raises(OverloadedError):
        queue.push(a_request("5", "c"), 1)
    assert len(queue) == 3


def test_tenants_that_came_and_went_are_bounded() -> None:
    queue = FairQueue(10, 10)
    for number in range(TENANTS_MAX + 50):
        queue.charge(str(number), 1)
    assert len(queue._had) == TENANTS_MAX


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
def test_every_request_leaves_once_and_backlogged_tenants_stay_close(
    steps: list[tuple[str, int, bool]],
) -> None:
    queue = FairQueue(1000, 1000)
    cost = {}
    for number, (tenant, tokens, _) in enumerate(steps):
        cost[str(number)] = (tenant, tokens)
        queue.push(a_request(str(number), tenant), tokens)
    served: Counter[str] = Counter()
    backlog = Counter(tenant for tenant, _, _ in steps)
    names = []
    while (request := queue.pop(lambda _: True)) is not None:
        names.append(request.request_id)
        tenant, tokens = cost[request.request_id]
        served[tenant] += tokens
        backlog[tenant] -= 1
        still = [one for one in "abc" if backlog[one] > 0]
        # Two tenants that always had work differ by one request each at the most.
        if len(still) > 1:
            counts = [served[one] for one in still]
            assert max(counts) - min(counts) <= 100
    assert sorted(names) == sorted(cost)


def test_a_budget_refuses_before_any_work_and_says_when() -> None:
    budgets = TokenBudgets(600)
    budgets.reserve("a", 500, NOW)
    with pytest.raises(RateLimitExceededError) as caught:
        budgets.reserve("a", 200, NOW)
    standing = caught.value.standing
    assert standing is not None
    assert (standing.count_max, standing.remaining, standing.reset_s) == (600, 100, 10)
    budgets.reserve("b", 600, NOW)
    budgets.reserve("a", 200, NOW + 10_000)


def test_what_was_not_used_comes_back_up_to_the_bucket() -> None:
    budgets = TokenBudgets(600)
    budgets.reserve("a", 600, NOW)
    budgets.give_back("a", 500, NOW)
    budgets.reserve("a", 500, NOW)
    budgets.give_back("a", 5_000, NOW)
    with pytest.raises(RateLimitExceededError):
        budgets.reserve("a", 600, NOW) or budgets.reserve("a", 1, NOW)


def test_a_request_larger_than_the_bucket_needs_a_full_one_and_leaves_a_debt() -> None:
    budgets = TokenBudgets(600)
    budgets.reserve("a", 900, NOW)
    with pytest.raises(RateLimitExceededError):
        budgets.reserve("a", 1, NOW + MINUTE_MS // 4)
    budgets.reserve("a", 1, NOW + MINUTE_MS)


def test_no_budget_refuses_nothing_and_remembers_nobody() -> None:
    budgets = TokenBudgets(0)
    budgets.reserve("a", 10**9, NOW)
    budgets.give_back("a", 1, NOW)
    assert not budgets._levels


def test_budgets_of_many_tenants_are_bounded() -> None:
    budgets = TokenBudgets(10)
    for number in range(TENANTS_MAX + 5):
        budgets.reserve(str(number), 1, NOW)
    assert len(budgets._levels) == TENANTS_MAX


def test_requests_are_not_changed_by_waiting() -> None:
    queue = FairQueue(2, 2)
    request = replace(a_request("x"), prefix=(1, 2))
    queue.push(request, 1)
    assert queue.pop(lambda _: True) is request

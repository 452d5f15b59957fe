"""The choice of a replica: score, prefix, session, region, conditions; the router's record."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from serve_app.core.ejection import LOSSES_MAX, STALL_MS
from serve_app.core.errors import ModelNotAvailableError, NoHostsAvailableError
from serve_app.core.grants import is_signed
from serve_app.core.inference import AdmitRequest, Begun, Placement, ReplicaLoad, ReplicaNews
from serve_app.core.prefix import BLOCK_TOKENS
from serve_app.core.routing import (
    BOUND_SLACK_MS,
    CANDIDATES_SHOWN,
    FORGET_MS,
    REPORT_TTL_MS,
    RESERVATION_MS,
    SESSIONS_MAX,
    Fleet,
    ReplicaReport,
    decimal_of,
)
from serve_app.services.routing import DECISIONS_MAX, GRANT_TTL_MS, Router
from tests.support.virtual_time import VirtualClock, virtual_time

NOW = 1_000_000
PREFIX = tuple(range(100, 110))  # ten blocks


def a_report(
    replica_id: str,
    prefill_tokens: int = 0,
    *,
    at_ms: int = NOW,
    phase: str = "ready",
    model: str = "m",
    news: ReplicaNews | None = None,
    **load: object,
) -> ReplicaReport:
    known = ReplicaLoad(
        replica_id,
        (model,),
        "127.0.0.1",
        9000,
        queued_tokens=prefill_tokens,
        prefill_tokens=prefill_tokens,
    )
    return ReplicaReport(replace(known, **load), phase, "", at_ms, news or ReplicaNews())


def a_fleet(*reports: ReplicaReport) -> Fleet:
    fleet = Fleet()
    for report in reports:
        fleet.hear(report)
    return fleet


def a_request(
    request_id: str = "r1", tokens: int = 10, model: str = "m", **members: object
) -> AdmitRequest:
    known = AdmitRequest(request_id, model, tokens + 10, prompt_tokens=tokens)
    return replace(known, **members)


def chosen(fleet: Fleet, request: AdmitRequest, now_ms: int = NOW) -> str:
    return fleet.choose(request, now_ms).load.replica_id


def test_the_replica_with_the_least_work_waiting_is_chosen() -> None:
    fleet = a_fleet(a_report("a", 300), a_report("b", 100), a_report("c", 200))
    choice = fleet.choose(a_request(), NOW)
    assert (choice.load.replica_id, choice.reason) == ("b", "load")
    assert [one.replica_id for one in choice.candidates] == ["b", "c", "a"]


def test_a_faster_replica_may_hold_more_work() -> None:
    fleet = a_fleet(a_report("cpu", 100, prefill_ms=1.0), a_report("gpu", 1000, prefill_ms=0.01))
    assert chosen(fleet, a_request()) == "gpu"


def test_tokens_to_decode_count_less_than_prompts_that_wait() -> None:
    decoding = a_report("decoding", 0, queued_tokens=300)
    prefilling = a_report("prefilling", 300)
    assert chosen(a_fleet(decoding, prefilling), a_request()) == "decoding"
    assert chosen(a_fleet(decoding, a_report("idle")), a_request()) == "idle"


def test_a_reservation_counts_until_the_replica_says_that_it_arrived() -> None:
    fleet = a_fleet(a_report("a"), a_report("b", 100))
    assert chosen(fleet, a_request("one", 300)) == "a"
    assert chosen(fleet, a_request("two", 300)) == "b"
    # a counts the request itself now: its report says 300, and nothing is counted twice.
    fleet.hear(a_report("a", 300, news=ReplicaNews(arrived=("one",))))
    assert chosen(fleet, a_request("three", 1)) == "a"
    assert set(fleet.reserved) == {"two", "three"}


def test_a_request_that_never_arrives_gives_its_reservation_back() -> None:
    fleet = a_fleet(a_report("a"), a_report("b", 100))
    chosen(fleet, a_request("lost", 300))
    later = NOW + RESERVATION_MS
    for name, tokens in (("a", 0), ("b", 100)):
        fleet.hear(a_report(name, tokens, at_ms=later))
    assert chosen(fleet, a_request("next"), later - 1) == "b"
    assert chosen(fleet, a_request("third"), later) == "a"


def test_a_request_that_is_admitted_again_is_reserved_once() -> None:
    fleet = a_fleet(a_report("a"))
    for _ in range(3):
        fleet.choose(a_request("same", 300), NOW)
    fleet.hear(a_report("a", news=ReplicaNews(arrived=("same",))))
    assert fleet.rank(a_request("next"), NOW).chosen.ttft_ms < 20


def test_many_requests_at_once_spread_over_equal_replicas() -> None:
    fleet = a_fleet(a_report("a"), a_report("b"), a_report("c"))
    where = [chosen(fleet, a_request(str(n), 100)) for n in range(9)]
    assert {name: where.count(name) for name in "abc"} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(
    ("draws", "expected"), [((0.0, 0.0), "a"), ((0.99, 0.99), "c"), ((0.5, 0.99), "b")]
)
def test_among_equals_chance_decides(draws: tuple[float, float], expected: str) -> None:
    fleet = a_fleet(a_report("a"), a_report("b"), a_report("c"))
    choice = fleet.choose(a_request(), NOW, draws)
    assert (choice.load.replica_id, choice.reason) == (expected, "tie")


def test_a_prompt_goes_where_its_beginning_was_computed() -> None:
    fleet = a_fleet(a_report("a"), a_report("b"))
    fleet.hear(a_report("b", news=ReplicaNews(begun=(Begun("r0", "", PREFIX, 640, 0, 5.0),))))
    choice = fleet.choose(a_request(tokens=700, prefix=(*PREFIX, 999)), NOW)
    assert (choice.load.replica_id, choice.reason) == ("b", "prefix")
    assert choice.chosen.overlap_tokens == choice.chosen.held_tokens == 10 * BLOCK_TOKENS


def test_a_prefix_gives_way_to_load_when_waiting_costs_more_than_computing() -> None:
    fleet = a_fleet(a_report("a"), a_report("b", 600))
    fleet.hear(a_report("b", 600, news=ReplicaNews(begun=(Begun("r0", "", PREFIX, 640, 0, 5.0),))))
    assert chosen(fleet, a_request(tokens=700, prefix=PREFIX)) == "b"  # 640 saved, 600 waiting
    fleet.hear(a_report("b", 2000))
    assert chosen(fleet, a_request(tokens=700, prefix=PREFIX)) == "a"


def test_a_prompt_on_its_way_draws_its_like_before_it_is_computed() -> None:
    fleet = a_fleet(a_report("a"), a_report("b"))
    first = fleet.choose(a_request("one", 640, prefix=PREFIX), NOW)
    fleet.hear(a_report(first.load.replica_id, news=ReplicaNews(arrived=("one",))))
    second = fleet.choose(a_request("two", 640, prefix=PREFIX), NOW)
    assert second.load.replica_id == first.load.replica_id
    assert second.chosen.held_tokens == 0


def test_an_estimate_below_the_overlap_leaves_a_token_to_compute() -> None:
    fleet = a_fleet(a_report("a", news=ReplicaNews(begun=(Begun("r", "", PREFIX, 1, 0, 1.0),))))
    assert fleet.choose(a_request(tokens=5, prefix=PREFIX), NOW).chosen.overlap_tokens == 4
    assert fleet.choose(a_request("r2", 0, prefix=PREFIX), NOW).chosen.overlap_tokens == 0


def test_a_session_stays_where_it_was() -> None:
    fleet = a_fleet(a_report("a"), a_report("b", 50))
    assert chosen(fleet, a_request("turn 1", session="s")) == "a"
    fleet.hear(a_report("a", 300))
    choice = fleet.choose(a_request("turn 2", session="s"), NOW)
    assert (choice.load.replica_id, choice.reason) == ("a", "session")


def test_another_routers_sessions_are_learned_from_the_replica() -> None:
    begun = Begun("elsewhere", "s", (), 10, 0, 5.0)
    fleet = a_fleet(a_report("a"), a_report("b", 50, news=ReplicaNews(begun=(begun,))))
    assert chosen(fleet, a_request(session="s")) == "b"


def test_a_session_leaves_an_overloaded_replica_and_a_dead_one() -> None:
    fleet = a_fleet(a_report("a"), a_report("b"))
    assert chosen(fleet, a_request("turn 1", session="s")) == "a"
    fleet.hear(a_report("a", int(12 * BOUND_SLACK_MS)))
    assert chosen(fleet, a_request("turn 2", session="s")) == "b"
    fleet.hear(a_report("b", phase="draining"))
    assert chosen(fleet, a_request("turn 3", session="s")) == "a"


def test_sessions_are_bounded() -> None:
    fleet = a_fleet(a_report("a"))
    for number in range(SESSIONS_MAX + 1):
        fleet.choose(a_request(str(number), session=f"s{number}"), NOW)
    assert len(fleet.sessions) == SESSIONS_MAX
    assert "s0" not in fleet.sessions


def test_a_region_is_a_wish() -> None:
    fleet = a_fleet(a_report("far", 0), a_report("near", 300, region="eu"))
    here = Placement(region="eu")
    choice = fleet.choose(a_request(placement=here), NOW)
    assert (choice.load.replica_id, choice.reason) == ("near", "region")
    fleet.hear(a_report("near", 9000, region="eu"))
    assert chosen(fleet, a_request("r2", placement=here)) == "far"
    assert chosen(fleet, a_request("r3", placement=Placement(region="moon"))) == "far"


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (Placement(host="b"), "b"),
        (Placement(min_stake="10"), "b"),
        (Placement(min_stake="10.5"), "b"),
        (Placement(min_stake="9"), "a"),
        (Placement(max_latency_ms=20), "a"),
        (Placement(host="c"), "host c cannot take it: not here"),
        (Placement(host="a", min_stake="10"), "host a cannot take it: stake"),
        (Placement(min_stake="11"), "2 stake"),
        (Placement(max_latency_ms=1), "2 latency"),
        (Placement(min_stake="11", max_latency_ms=20), "2 stake"),
    ],
)
def test_conditions_are_kept_or_named(placement: Placement, expected: str) -> None:
    fleet = a_fleet(a_report("a", 0, stake="9.99"), a_report("b", 300, stake="10.50"))
    request = a_request(tokens=1, placement=placement)
    if len(expected) == 1:
        assert chosen(fleet, request) == expected
        return
    with pytest.raises(NoHostsAvailableError, match=expected):
        fleet.choose(request, NOW)


@pytest.mark.parametrize("text", ["", "x", "NaN", "inf", "1e", "--1"])
def test_a_stake_that_is_no_number_is_none(text: str) -> None:
    assert decimal_of(text) == 0


def test_excluded_replicas_are_passed_over() -> None:
    fleet = a_fleet(a_report("a", 0), a_report("b", 100))
    assert chosen(fleet, a_request(excluded=("a",))) == "b"
    with pytest.raises(NoHostsAvailableError, match="m is ready: 2 lost this request"):
        fleet.choose(a_request(excluded=("a", "b")), NOW)


@pytest.mark.parametrize("phase", ["starting", "draining", "failed"])
def test_a_replica_that_is_not_ready_is_not_chosen(phase: str) -> None:
    fleet = a_fleet(a_report("a", phase=phase))
    with pytest.raises(NoHostsAvailableError, match=phase):
        fleet.choose(a_request(), NOW)


def test_a_stale_report_is_not_believed() -> None:
    fleet = a_fleet(a_report("a"))
    assert chosen(fleet, a_request(), NOW + REPORT_TTL_MS - 1) == "a"
    with pytest.raises(NoHostsAvailableError, match="1 silent"):
        fleet.choose(a_request(), NOW + REPORT_TTL_MS)


@pytest.mark.parametrize(("age_ms", "is_known"), [(FORGET_MS, True), (FORGET_MS + 1, False)])
def test_a_replica_that_is_long_gone_is_forgotten(age_ms: int, *, is_known: bool) -> None:
    fleet = a_fleet(a_report("gone", news=ReplicaNews(begun=(Begun("r", "", PREFIX, 9, 0, 1.0),))))
    fleet.hear(a_report("b", at_ms=NOW + age_ms))
    assert ("gone" in fleet.reports) is is_known


def test_an_ejected_replica_is_passed_over_while_there_are_others() -> None:
    fleet = a_fleet(a_report("a"), a_report("b", 500))
    for number in range(LOSSES_MAX):
        request = a_request(f"lost-{number}", excluded=("a",))
        assert chosen(fleet, request) == "b"
    choice = fleet.rank(a_request(), NOW)
    assert choice.load.replica_id == "b"
    assert [one.refusal for one in choice.candidates] == ["", "ejected"]
    fleet.hear(a_report("b", phase="draining"))
    assert chosen(fleet, a_request()) == "a"


def test_a_first_token_brings_an_ejected_replica_back() -> None:
    fleet = a_fleet(a_report("a"), a_report("b", 500))
    for number in range(LOSSES_MAX):
        fleet.rank(a_request(f"lost-{number}", excluded=("a",)), NOW)
    fleet.hear(a_report("a", news=ReplicaNews(begun=(Begun("r", "", (), 1, 0, 1.0),))))
    assert chosen(fleet, a_request()) == "a"


def test_a_stalled_replica_is_not_chosen_even_alone() -> None:
    later = NOW + STALL_MS
    fleet = a_fleet(a_report("a", step_count=5, running_count=1))
    fleet.hear(a_report("a", step_count=5, running_count=1, at_ms=later))
    with pytest.raises(NoHostsAvailableError, match="1 stalled"):
        fleet.choose(a_request(), later)
    fleet.hear(a_report("a", step_count=6, running_count=1, at_ms=later))
    assert chosen(fleet, a_request(), later) == "a"


def test_an_unknown_model_names_those_that_are_there() -> None:
    fleet = a_fleet(a_report("a", model="m2"), a_report("b", model="m1"), a_report("c", model="m1"))
    with pytest.raises(ModelNotAvailableError, match="no model 'other'; available: m1, m2"):
        fleet.choose(a_request(model="other"), NOW)


@pytest.mark.parametrize("model", ["", "m"])
def test_a_router_that_has_heard_nothing_yet_denies_no_model(model: str) -> None:
    with pytest.raises(NoHostsAvailableError, match="no model replica has reported yet"):
        Fleet().choose(a_request(model=model), NOW)


def test_no_model_named_takes_any_replica() -> None:
    fleet = a_fleet(a_report("a", 100, model="m1"), a_report("b", 0, model="m2"))
    assert chosen(fleet, a_request(model="")) == "b"


def test_ranking_reserves_nothing_and_shows_a_bounded_list() -> None:
    fleet = a_fleet(*(a_report(str(n), n) for n in range(CANDIDATES_SHOWN + 3)))
    assert len(fleet.rank(a_request(), NOW).candidates) == CANDIDATES_SHOWN
    assert fleet.reserved == {}


class Registry:
    """Reports that a test hands over."""

    def __init__(self, *reports: ReplicaReport) -> None:
        self.given = reports

    @asynccontextmanager
    async def reports(self) -> AsyncIterator[AsyncIterator[ReplicaReport]]:
        async def stream() -> AsyncIterator[ReplicaReport]:
            for report in self.given:
                yield report
            await asyncio.Event().wait()

        yield stream()


@asynccontextmanager
async def running(router: Router, clock: VirtualClock) -> AsyncIterator[Router]:
    task = asyncio.create_task(router.run())
    await clock.sleep(0.001)
    yield router
    task.cancel()


class Draws:
    def uniform(self) -> float:
        return 0.0

    def token(self) -> str:
        return "token"


@virtual_time
async def test_a_grant_names_the_replica_is_signed_and_expires() -> None:
    clock = VirtualClock()
    now_ms = clock.now_ms()
    registry = Registry(a_report("a", 50, at_ms=now_ms), a_report("b", 10, at_ms=now_ms))
    async with running(Router(registry, b"secret", clock, Draws()), clock) as router:
        grant = await router.admit(a_request())
    assert (grant.request_id, grant.replica_id, grant.port) == ("r1", "b", 9000)
    assert grant.expires_at_ms == clock.now_ms() + GRANT_TTL_MS
    assert is_signed(b"secret", grant)
    assert not is_signed(b"other", grant)


@virtual_time
async def test_a_decision_is_kept_with_what_came_of_it() -> None:
    clock = VirtualClock()
    registry = Registry(a_report("a", at_ms=clock.now_ms()))
    router = Router(registry, b"secret", clock, Draws())
    async with running(router, clock):
        await router.admit(a_request("first"))
        await router.admit(a_request("second"))
    begun = Begun("first", "", (), 12, 8, 33.0)
    registry.given = (a_report("a", at_ms=clock.now_ms(), news=ReplicaNews(begun=(begun,))),)
    async with running(router, clock):
        newest, oldest = await router.decisions(2)
    assert (newest.request_id, newest.ttft_ms) == ("second", None)
    assert (oldest.request_id, oldest.ttft_ms, oldest.cached_tokens) == ("first", 33.0, 8)
    assert oldest.chosen.ttft_ms > 0
    assert len(await router.decisions(1)) == 1


@virtual_time
async def test_decisions_are_bounded() -> None:
    clock = VirtualClock()
    registry = Registry(a_report("a", at_ms=clock.now_ms()))
    async with running(Router(registry, b"secret", clock, Draws()), clock) as router:
        for number in range(DECISIONS_MAX + 1):
            await router.admit(a_request(str(number)))
        assert len(await router.decisions(DECISIONS_MAX * 2)) == DECISIONS_MAX

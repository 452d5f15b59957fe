"""The choice of a replica: fewest queued tokens, reservations, age, phase; the grant for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serve_app.core.errors import ModelNotAvailableError, NoHostsAvailableError
from serve_app.core.grants import is_signed
from serve_app.core.inference import AdmitRequest, ReplicaLoad
from serve_app.core.routing import REPORT_TTL_MS, RESERVATION_MS, Fleet, ReplicaReport
from serve_app.services.routing import GRANT_TTL_MS, Router
from tests.support.virtual_time import VirtualClock, virtual_time

NOW = 1_000_000


def a_report(
    replica_id: str,
    queued_tokens: int = 0,
    *,
    at_ms: int = NOW,
    phase: str = "ready",
    model: str = "m",
) -> ReplicaReport:
    load = ReplicaLoad(replica_id, (model,), "127.0.0.1", 9000, queued_tokens=queued_tokens)
    return ReplicaReport(load, phase, "", at_ms)


def a_fleet(*reports: ReplicaReport) -> Fleet:
    fleet = Fleet()
    for report in reports:
        fleet.hear(report)
    return fleet


def a_request(tokens: int = 10, model: str = "m", excluded: tuple[str, ...] = ()) -> AdmitRequest:
    return AdmitRequest("r1", model, tokens, excluded)


def test_the_replica_with_the_fewest_queued_tokens_is_chosen() -> None:
    fleet = a_fleet(a_report("a", 300), a_report("b", 100), a_report("c", 200))
    assert fleet.choose(a_request(), NOW).replica_id == "b"


def test_a_reservation_counts_until_the_replica_reports_it_itself() -> None:
    fleet = a_fleet(a_report("a", 0), a_report("b", 100))
    assert fleet.choose(a_request(tokens=150), NOW).replica_id == "a"
    assert fleet.choose(a_request(tokens=150), NOW).replica_id == "b"
    assert fleet.choose(a_request(tokens=1), NOW + RESERVATION_MS - 1).replica_id == "a"
    # Both large reservations have lapsed; of a's three tokens one still stands.
    assert fleet.choose(a_request(tokens=1), NOW + RESERVATION_MS).replica_id == "a"
    assert fleet.reserved["a"] == [
        (NOW + 2 * RESERVATION_MS - 1, 1),
        (NOW + 2 * RESERVATION_MS, 1),
    ]


def test_many_requests_at_once_spread_over_equal_replicas() -> None:
    fleet = a_fleet(a_report("a"), a_report("b"), a_report("c"))
    chosen = [fleet.choose(a_request(), NOW).replica_id for _ in range(9)]
    assert {name: chosen.count(name) for name in "abc"} == {"a": 3, "b": 3, "c": 3}


def test_a_new_report_replaces_the_last_one() -> None:
    fleet = a_fleet(a_report("a", 0), a_report("b", 100), a_report("a", 500))
    assert fleet.choose(a_request(), NOW).replica_id == "b"


def test_excluded_replicas_are_passed_over() -> None:
    fleet = a_fleet(a_report("a", 0), a_report("b", 100))
    assert fleet.choose(a_request(excluded=("a",)), NOW).replica_id == "b"
    with pytest.raises(NoHostsAvailableError, match="no replica of m is ready"):
        fleet.choose(a_request(excluded=("a", "b")), NOW)


@pytest.mark.parametrize("phase", ["starting", "draining", "failed"])
def test_a_replica_that_is_not_ready_is_not_chosen(phase: str) -> None:
    fleet = a_fleet(a_report("a", phase=phase))
    with pytest.raises(NoHostsAvailableError):
        fleet.choose(a_request(), NOW)


def test_a_stale_report_is_not_believed() -> None:
    fleet = a_fleet(a_report("a"))
    assert fleet.choose(a_request(), NOW + REPORT_TTL_MS - 1).replica_id == "a"
    assert len(fleet.live(NOW + REPORT_TTL_MS - 1)) == 1
    with pytest.raises(NoHostsAvailableError):
        fleet.choose(a_request(), NOW + REPORT_TTL_MS)
    assert fleet.live(NOW + REPORT_TTL_MS) == ()


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
    assert fleet.choose(a_request(model=""), NOW).replica_id == "b"


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


@virtual_time
async def test_a_grant_names_the_replica_is_signed_and_expires() -> None:
    clock = VirtualClock()
    now_ms = clock.now_ms()
    registry = Registry(a_report("a", 50, at_ms=now_ms), a_report("b", 10, at_ms=now_ms))
    router = Router(registry, b"secret", clock)
    running = asyncio.create_task(router.run())
    await clock.sleep(0.001)
    grant = await router.admit(a_request())
    running.cancel()
    assert (grant.request_id, grant.replica_id, grant.port) == ("r1", "b", 9000)
    assert grant.expires_at_ms == clock.now_ms() + GRANT_TTL_MS
    assert is_signed(b"secret", grant)
    assert not is_signed(b"other", grant)

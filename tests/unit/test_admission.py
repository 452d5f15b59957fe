"""Admission at the router: room, waiting, fairness over reports, deadlines, budgets, bounds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from serve_app.core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotAvailableError,
    NoHostsAvailableError,
    OverloadedError,
    RateLimitExceededError,
)
from serve_app.core.inference import AdmitRequest, Ended, Grant, ReplicaLoad, ReplicaNews
from serve_app.core.routing import ReplicaReport
from serve_app.services.routing import AdmissionLimits, Router
from tests.support.virtual_time import VirtualClock, virtual_time

SLOTS = 2
LIMITS = AdmissionLimits(wait_s=5.0, queue_max=4, tenant_queue_max=3)


class Draws:
    def uniform(self) -> float:
        return 0.0

    def token(self) -> str:
        return "token"


@dataclass
class Bench:
    """A router, and one replica that reports what a test says."""

    router: Router
    clock: VirtualClock
    heard: "asyncio.Queue[ReplicaReport]"

    async def report(
        self, open_count: int = 0, ended: tuple[Ended, ...] = (), **members: str
    ) -> None:
        load = ReplicaLoad("a", ("m",), "127.0.0.1", 1, open_count=open_count, slots=SLOTS)
        arrived = tuple(self.router._fleet.reserved)
        news = ReplicaNews(arrived=arrived, ended=ended)
        report = ReplicaReport(load, "ready", "", self.clock.now_ms(), news)
        self.heard.put_nowait(replace(report, **members))  # type: ignore[arg-type]
        await self.clock.sleep(0.001)

    async def ask(self, name: str, tenant: str = "t", **members: object) -> "asyncio.Task[Grant]":
        request = AdmitRequest(name, "m", 100, prompt_tokens=50, tenant=tenant)
        asked = asyncio.create_task(self.router.admit(replace(request, **members)))  # type: ignore[arg-type]
        await self.clock.sleep(0.001)
        return asked


@asynccontextmanager
async def bench(limits: AdmissionLimits = LIMITS) -> AsyncIterator[Bench]:
    heard: asyncio.Queue[ReplicaReport] = asyncio.Queue()

    class Registry:
        @asynccontextmanager
        async def reports(self) -> AsyncIterator[AsyncIterator[ReplicaReport]]:
            async def stream() -> AsyncIterator[ReplicaReport]:
                while True:
                    yield await heard.get()

            yield stream()

    clock = VirtualClock()
    router = Router(Registry(), b"secret", clock, Draws(), limits)  # type: ignore[arg-type]
    hearing = asyncio.create_task(router.run())
    made = Bench(router, clock, heard)
    await made.report()
    yield made
    assert router._answers == {}
    hearing.cancel()


@virtual_time
async def test_what_finds_no_room_waits_until_a_report_shows_some() -> None:
    async with bench() as plane:
        first = [await plane.ask(name) for name in ("1", "2")]
        late = await plane.ask("3")
        assert [task.done() for task in (*first, late)] == [True, True, False]
        await plane.report(open_count=2)
        assert not late.done()
        await plane.report(open_count=1)
        assert late.result().request_id == "3"


@virtual_time
async def test_whoever_comes_later_does_not_overtake() -> None:
    async with bench() as plane:
        for name in ("1", "2"):
            await plane.ask(name)
        third = await plane.ask("3")
        fourth = await plane.ask("4")
        await plane.report(open_count=1)
        assert third.done()
        fifth = await plane.ask("5")
        assert not fourth.done()
        assert not fifth.done()
        await plane.report(open_count=0)
        assert fourth.done()
        assert fifth.done()


@virtual_time
async def test_a_light_tenant_goes_before_a_heavy_ones_queue() -> None:
    async with bench() as plane:
        for name in ("1", "2"):
            await plane.ask(name, "heavy")
        heavy = [await plane.ask(f"h{number}", "heavy") for number in range(3)]
        light = await plane.ask("light", "light")
        await plane.report(open_count=1)
        assert light.done()
        assert not any(task.done() for task in heavy)
        for _ in range(2):
            await plane.report(open_count=0)
        assert all(task.done() for task in heavy)


@virtual_time
async def test_the_rest_of_an_answer_waits_for_nobody() -> None:
    async with bench() as plane:
        for name in ("1", "2"):
            await plane.ask(name)
        waiting = await plane.ask("3")
        resumed = await plane.ask("4~2", is_resumed=True)
        assert resumed.done()
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])


@virtual_time
async def test_waiting_ends_by_patience_deadline_or_the_caller() -> None:
    async with bench() as plane:
        for name in ("1", "2"):
            await plane.ask(name)
        patient = await plane.ask("patient")
        urgent = await plane.ask("urgent", deadline_ms=plane.clock.now_ms() + 1000)
        gone = await plane.ask("gone")
        gone.cancel()
        await plane.clock.sleep(1.1)
        with pytest.raises(DeadlineExceededError):
            urgent.result()
        assert not patient.done()
        await plane.clock.sleep(5)
        with pytest.raises(OverloadedError, match="5 s"):
            patient.result()
        assert len(plane.router._queues["m"]) == 0
        assert gone.cancelled()


@virtual_time
async def test_two_of_one_id_do_not_mix() -> None:
    async with bench() as plane:
        for name in ("1", "2"):
            await plane.ask(name)
        first = await plane.ask("same")
        with pytest.raises(InvalidRequestError):
            (await plane.ask("same")).result()
        await plane.report(open_count=1)
        assert first.done()


@virtual_time
async def test_the_queue_is_bounded_for_a_tenant_and_for_all() -> None:
    async with bench() as plane:
        for name in ("1", "2"):
            await plane.ask(name)
        waiting = [await plane.ask(f"w{number}") for number in range(3)]
        with pytest.raises(RateLimitExceededError):
            (await plane.ask("too many of one")).result()
        waiting.append(await plane.ask("other", "other"))
        with pytest.raises(OverloadedError):
            (await plane.ask("too many of all", "third")).result()
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


@virtual_time
async def test_one_that_waits_hears_that_its_replicas_are_gone() -> None:
    async with bench() as plane:
        for name in ("1", "2"):
            await plane.ask(name)
        waiting = await plane.ask("3")
        await plane.report(open_count=2, phase="draining")
        with pytest.raises(NoHostsAvailableError, match="draining"):
            waiting.result()


@virtual_time
async def test_a_budget_is_reserved_and_put_right_by_what_was_spent() -> None:
    async with bench(replace(LIMITS, tenant_tokens_per_minute=250)) as plane:
        for name in ("1", "2"):
            await plane.ask(name)
        with pytest.raises(RateLimitExceededError) as caught:
            (await plane.ask("3")).result()
        assert caught.value.standing is not None
        assert caught.value.standing.reset_s == 12
        await plane.report(ended=(Ended("1", "t", 50, 0, 10), Ended("unknown", "t", 1, 0, 1)))
        assert (await plane.ask("4")).done()


@virtual_time
async def test_a_refused_request_keeps_no_budget() -> None:
    async with bench(replace(LIMITS, tenant_tokens_per_minute=150)) as plane:
        with pytest.raises(ModelNotAvailableError):
            (await plane.ask("1", model="other")).result()
        assert (await plane.ask("2")).done()


@virtual_time
async def test_made_up_models_leave_no_trace() -> None:
    async with bench() as plane:
        for number in range(20):
            with pytest.raises(ModelNotAvailableError):
                (await plane.ask("x", model=f"m{number}")).result()
        assert plane.router._queues == {}

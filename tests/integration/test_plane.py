"""The model plane's reports through Valkey, and the router's decisions at the API."""

import asyncio

import pytest
from redis.asyncio import Redis

from inferpipe.wire import DecisionList
from serve_app.adapters.redis_replicas import RedisReplicas
from serve_app.adapters.system import SystemClock
from serve_app.core.inference import Begun, Ended, ReplicaLoad, ReplicaNews
from serve_app.core.routing import ReplicaReport
from tests.integration.conftest import ONE_SERVER, StoreBench
from tests.support.api import Api

NEWS = ReplicaNews(
    arrived=("r1",),
    begun=(Begun("r1", "s", (1, 2**62), 20, 4, 1.5),),
    ended=(Ended("r1", "acme", 20, 4, 3),),
)


async def test_a_report_comes_as_it_was_sent(bench: StoreBench) -> None:
    clock = SystemClock()
    registry = RedisReplicas(bench.nodes, bench.calls, clock)
    load = ReplicaLoad("host-1", ("m",), "127.0.0.1", 1, prefill_ms=0.5, region="eu", stake="1.5")
    report = ReplicaReport(load, "ready", "", clock.now_ms(), NEWS)
    async with registry.reports() as reports:
        await registry.announce(report)
        async with asyncio.timeout(5):
            assert await anext(reports) == report
    assert await registry.latest() == (report,)


async def test_a_newer_releases_report_is_read_as_far_as_it_is_known(bench: StoreBench) -> None:
    registry = RedisReplicas(bench.nodes, bench.calls, SystemClock())
    newer = (
        b'{"load": {"replica_id": "h", "models": ["m"], "host": "", "port": 1, "mood": 5},'
        b' "phase": "ready", "detail": "", "at_ms": 9999999999999, "weather": "fine",'
        b' "news": {"ended": [{"request_id": "r", "tenant": "t", "prompt_tokens": 1,'
        b' "cached_tokens": 0, "completion_tokens": 2, "joy": 1}]}}'
    )
    await bench.client.hset("ip:{config}:replicas", "h", newer)
    [report] = await registry.latest()
    assert report.load == ReplicaLoad("h", ("m",), "", 1)
    assert report.news.ended == (Ended("r", "t", 1, 0, 2),)


async def test_the_operator_sees_decisions(api: Api) -> None:
    answer = await api.http.get("/v1/hosts/decisions", params={"limit": 2})
    assert answer.status_code == 200, answer.text
    first = DecisionList.model_validate(answer.json()).items[0]
    assert len(answer.json()["items"]) == 2
    assert (first.host_id, first.reason, first.ttft_ms) == ("host", "prefix", 11.0)
    assert [one.refusal for one in first.candidates] == [None, "draining"]


@pytest.mark.parametrize("limit", ["0", "501", "x", "-1", "1e3", ""])
async def test_a_limit_out_of_bounds_is_refused(api: Api, limit: str) -> None:
    answer = await api.http.get("/v1/hosts/decisions", params={"limit": limit})
    assert (answer.status_code, answer.json()["code"]) == (422, "INVALID_REQUEST")


async def test_decisions_are_the_operators_alone(api: Api) -> None:
    headers = await api.new_workspace("acme")
    assert (await api.http.get("/v1/hosts/decisions", headers=headers)).status_code == 403
    headers = await api.new_key("execute")
    assert (await api.http.get("/v1/hosts/decisions", headers=headers)).status_code == 403


@ONE_SERVER
async def test_reports_outlive_a_store_that_went_away(bench: StoreBench) -> None:
    clock = SystemClock()
    registry = RedisReplicas(bench.nodes, bench.calls, clock)
    report = ReplicaReport(ReplicaLoad("h", ("m",), "", 1), "ready", "", clock.now_ms())
    async with registry.reports() as reports, Redis.from_url(bench.url) as killer:
        await killer.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        heard = asyncio.ensure_future(anext(reports))
        async with asyncio.timeout(10):
            while not heard.done():
                await registry.announce(report)
                await asyncio.wait([heard], timeout=0.05)
    assert heard.result().load.replica_id == "h"

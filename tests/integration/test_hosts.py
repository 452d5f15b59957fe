"""Hosts: the replicas' own reports, and the choice among them."""

from pathlib import Path

import pytest

from serve_app.adapters.redis_replicas import RedisReplicas
from serve_app.adapters.system import SystemClock
from serve_app.core.inference import ReplicaLoad
from serve_app.core.routing import ReplicaReport
from tests.support.api import Api, running_api


async def report(
    api: Api, host: str, *, age_ms: int = 0, phase: str = "ready", **load: object
) -> None:
    registry = api.services.hosts._registry
    assert isinstance(registry, RedisReplicas)
    present = ReplicaLoad(host, ("m",), "127.0.0.1", 1, **load)  # type: ignore[arg-type]
    await registry.announce(ReplicaReport(present, phase, "", SystemClock().now_ms() - age_ms))


async def test_a_host_is_shown_with_all_its_members(api: Api) -> None:
    await report(
        api, "h1", region="eu", stake="12.50", ttft_ms=41.234, running_count=3, queued_tokens=900,
        kv_usage=0.25,
    )  # fmt: skip
    assert (await api.http.get("/v1/hosts")).json() == {
        "hosts": [
            {
                "id": "h1", "apiUrl": "ws://127.0.0.1:8000/hosts/h1", "models": ["m"],
                "region": "eu", "stake": "12.50", "status": "ready", "latencyMs": 41.23,
                "load": 3, "queuedTokens": 900, "kvUsage": 0.25,
            }
        ]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("public_url", "api_url"),
    [
        ("https://api.example/ip/", "wss://api.example/ip/hosts/h1"),
        ("http://10.0.0.1:8000", "ws://10.0.0.1:8000/hosts/h1"),
    ],
)
async def test_a_proxy_before_us_has_its_address_told(
    valkey_url: str, tmp_path: Path, public_url: str, api_url: str
) -> None:
    async with running_api(valkey_url, tmp_path, public_url=public_url) as api:
        await report(api, "h1")
        assert (await api.http.get("/v1/hosts")).json()["hosts"][0]["apiUrl"] == api_url


async def test_hosts_that_do_not_serve_are_shown_for_a_while(api: Api) -> None:
    await report(api, "b-ready")
    await report(api, "a-silent", age_ms=10_000)
    await report(api, "a-silent-too", age_ms=10_000, phase="draining")
    await report(api, "c-starting", age_ms=120_000, phase="starting")
    await report(api, "d-failed", age_ms=10_000, phase="failed")
    await report(api, "e-gone", age_ms=90_000)
    await report(api, "f-failed-long-ago", age_ms=90_000, phase="failed")
    hosts = (await api.http.get("/v1/hosts")).json()["hosts"]
    assert [(host["id"], host["status"]) for host in hosts] == [
        ("b-ready", "ready"), ("a-silent", "lost"), ("a-silent-too", "lost"),
        ("c-starting", "starting"),
        ("d-failed", "failed"),
    ]  # fmt: skip
    assert hosts[0]["latencyMs"] is None


async def select(api: Api, **wish: object) -> tuple[int, str]:
    answer = await api.http.post("/v1/hosts/select", json={"model": "m", **wish})
    body = answer.json()
    return answer.status_code, body.get("id") or body["code"]


async def test_select_by_load_stake_latency_and_region(api: Api) -> None:
    assert await select(api) == (503, "NO_HOSTS_AVAILABLE")
    await report(api, "idle", stake="1", region="us")
    await report(
        api, "busy", stake="9007199254740993.5", region="eu", queued_tokens=900,
        prefill_tokens=900, prefill_ms=1.0,
    )  # fmt: skip
    await report(api, "silent", stake="99999999999999999", age_ms=10_000)
    assert await select(api) == (200, "idle")
    assert await select(api, minStake="9007199254740993") == (200, "busy")
    assert await select(api, minStake="9007199254740993.6") == (503, "NO_HOSTS_AVAILABLE")
    assert await select(api, maxLatency=100) == (200, "idle")
    assert await select(api, maxLatency=100, minStake="2") == (503, "NO_HOSTS_AVAILABLE")
    assert await select(api, region="us") == (200, "idle")
    assert await select(api, region="mars") == (200, "idle")  # a wish, no condition
    assert await select(api, model="other") == (404, "MODEL_NOT_AVAILABLE")


@pytest.mark.parametrize(
    "wish",
    [{"minStake": "-1"}, {"minStake": 1}, {"minStake": "1e9"}, {"maxLatency": 0},
     {"maxLatency": "5"}, {"model": ""}, {"model": None}, {"host": "h1"}],
)  # fmt: skip
async def test_select_refuses_what_is_no_requirement(api: Api, wish: dict[str, object]) -> None:
    assert (await select(api, **wish))[0] == 422


async def test_a_session_wants_a_model_that_is_served(api: Api) -> None:
    early = await api.http.post("/v1/sessions", json={"model": "any"})
    assert early.status_code == 201  # no replica has reported yet
    await report(api, "h1")
    late = await api.http.post("/v1/sessions", json={"model": "any"})
    assert (late.status_code, late.json()["code"]) == (404, "MODEL_NOT_AVAILABLE")

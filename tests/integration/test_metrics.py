"""/metrics: counters move, labels stay bounded, all processes are on the page."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from serve_app.adapters import redis_metrics
from serve_app.adapters.metrics import EngineMetrics
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.core.inference import FinishReason, Measured, Usage
from tests.support.api import ADMIN_KEY, Api, running_api

ECHO = {"workflowId": "test-echo", "input": {}}


async def scrape(api: Api) -> dict[tuple[str, str], float]:
    """Value by name and labels without `process`."""
    answer = await api.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = {k: v for k, v in sorted(sample.labels.items()) if k != "process"}
            found[sample.name, ",".join(f"{k}={v}" for k, v in labels.items())] = sample.value
    return found


async def test_counters_move_between_two_scrapes(api: Api) -> None:
    before = await scrape(api)
    ran = await api.http.post("/v1/execute", json=ECHO)
    await api.http.get(f"/v1/executions/{ran.json()['id']}/stream")
    await api.http.get(f"/v1/executions/{ran.json()['id']}", headers={"X-API-Key": "none"})
    await api.http.get("/no/such/path")
    after = await scrape(api)
    grown = {
        ("inferpipe_http_requests_total", "method=POST,route=/v1/execute,status=2xx"): 1,
        (
            "inferpipe_http_requests_total",
            "method=GET,route=/v1/executions/{execution_id}/stream,status=2xx",
        ): 1,
        ("inferpipe_http_requests_total", "method=GET,route=none,status=4xx"): 1,
        ("inferpipe_http_request_seconds_count", "route=/v1/execute"): 1,
        ("inferpipe_executions_ended_total", "status=completed"): 1,
    }
    assert {name: after[name] - before.get(name, 0) for name in grown} == grown
    assert after["inferpipe_store_calls_total", ""] > before["inferpipe_store_calls_total", ""]
    assert after["inferpipe_open_streams", ""] == before["inferpipe_open_streams", ""]
    assert after["inferpipe_ready_executions", ""] == 0
    assert after["inferpipe_dead_messages", ""] == 0
    assert after["inferpipe_store_up", ""] == 1


async def test_no_label_names_an_execution_or_a_tenant(api: Api) -> None:
    other = await api.new_workspace("tenant-of-the-label-test")
    ran = await api.http.post("/v1/execute", json=ECHO, headers=other)
    await api.http.request("PROPFIND", f"/v1/executions/{ran.json()['id']}", headers=other)
    page = (await api.http.get("/metrics")).text
    assert ran.json()["id"] not in page
    assert "tenant-of-the-label-test" not in page
    assert "PROPFIND" not in page


async def test_what_other_processes_published_is_on_the_page_while_it_is_fresh(
    api: Api, valkey_url: str
) -> None:
    now_ms = api.services.clock.now_ms()
    text = '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"} 3.0\n'
    async with Redis.from_url(valkey_url) as client:
        pages = {
            "model-a": orjson.dumps([now_ms, text]),
            "model-b": orjson.dumps([now_ms, text.replace("3.0", "4.0")]),
            "model-gone": orjson.dumps([now_ms - 31_000, text]),
        }
        await client.hset("ip:{config}:metrics", mapping=pages)
        page = (await api.http.get("/metrics")).text
        assert 'vllm:num_requests_running{engine="0",process="model-a"} 3.0' in page
        assert 'process="model-b"} 4.0' in page
        assert "model-gone" not in page
        assert page.count("# TYPE vllm:num_requests_running") == 1
        assert await client.hexists("ip:{config}:metrics", "model-gone") is False


async def test_a_store_that_is_away_is_told_in_time(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(redis_metrics, "STORE_WAIT_S", 0.05)
    monkeypatch.setattr(RedisCalls, "_call", hang)
    page = (await api.http.get("/metrics")).text
    assert "inferpipe_store_up 0.0" in page
    assert "inferpipe_http_requests_total" in page
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("given", "status"),
    [({"host": "0.0.0.0"}, 401), ({"host": "0.0.0.0", "metrics_open": True}, 200), ({}, 200)],
)
async def test_who_may_scrape(
    valkey_url: str, tmp_path: Path, given: dict[str, object], status: int
) -> None:
    async with running_api(valkey_url, tmp_path, **given) as api:
        other = await api.new_workspace("second")
        del api.http.headers["Authorization"]
        assert (await api.http.get("/metrics")).status_code == status
        if status == 401:
            admin = {"X-API-Key": ADMIN_KEY}
            assert (await api.http.get("/metrics", headers=admin)).status_code == 200
            assert (await api.http.get("/metrics", headers=other)).status_code == 403


def test_the_engines_numbers_have_vllms_names() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics("m", registry)
    cache = SimpleNamespace(queries=10, hits=4)
    metrics.step_ended(
        SimpleNamespace(
            num_running_reqs=2, num_waiting_reqs=1, kv_cache_usage=0.5, prefix_cache_stats=cache
        )
    )
    metrics.request_ended(Measured(Usage(7, 5), FinishReason.STOP, 0.1, 0.3))
    metrics.request_ended(Measured(Usage(7, 1), FinishReason.CANCELLED, None, 0.3))
    metrics.request_ended(Measured(Usage(7, 0), None, None, 0.3))
    page = generate_latest(registry).decode()
    labels = 'engine="0",model_name="m"'
    for line in (
        f"vllm:num_requests_running{{{labels}}} 2.0",
        f"vllm:num_requests_waiting{{{labels}}} 1.0",
        f"vllm:kv_cache_usage_perc{{{labels}}} 0.5",
        f"vllm:prefix_cache_hits_total{{{labels}}} 4.0",
        f"vllm:prompt_tokens_total{{{labels}}} 21.0",
        f"vllm:generation_tokens_total{{{labels}}} 6.0",
        f"vllm:time_to_first_token_seconds_count{{{labels}}} 1.0",
        'vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="error",model_name="m"} 1.0',
    ):
        assert line in page

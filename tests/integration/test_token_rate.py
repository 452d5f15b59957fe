"""A rate of tokens over HTTP and a real store: reserved before, counted after, given back."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from serve_app.adapters.redis_gates import RedisGates
from serve_app.core.gates import Rate, gate_name
from tests.integration.conftest import StoreBench
from tests.support.api import USAGE, Api

WINDOW_MS = 3_600_000
LIMIT = {"tokens": 100, "window": "1h"}
RESERVED, USED = 40, USAGE.total_tokens
ASK = {"id": "ask", "generate": {"prompt": "Hi", "max_tokens": RESERVED}}
HOLD = {"id": "hold", "approval": {"message": "?", "timeout": "1h"}}
NAME = gate_name("default", "rated", "tokens", "")


async def define(api: Api, limit: dict[str, Any], *steps: dict[str, Any]) -> None:
    document = {"rateLimit": limit, "steps": [*steps, ASK]}
    put = await api.http.put("/v1/workflows/rated", json=document)
    assert put.status_code == 201, put.text


async def run(api: Api, path: str = "/v1/execute", **members: object) -> httpx.Response:
    return await api.http.post(path, json={"workflowId": "rated", "input": {}, **members})


async def debt(api: Api, tokens: int = 100, window_ms: int = WINDOW_MS) -> int:
    """Tokens taken and not yet refilled."""
    key = f"ip:{{{int(NAME[:8], 16) % 4}}}:rate:{NAME}"
    due = await api.services.executions._store._calls.call("GET", key)
    left_ms = 0.0 if due is None else float(due) - api.services.clock.now_ms()
    return round(max(0.0, left_ms) * tokens / window_ms)


async def until_debt(api: Api, expected: int) -> None:
    async with asyncio.timeout(10):
        while await debt(api) != expected:
            await asyncio.sleep(0.01)


async def test_what_was_reserved_gives_way_to_what_was_used(api: Api) -> None:
    await define(api, LIMIT)
    spent = 0
    while spent + RESERVED <= LIMIT["tokens"]:
        assert (await run(api)).json()["status"] == "completed"
        spent += USED
        await until_debt(api, spent)
    refused = await run(api)
    assert refused.status_code == 429
    assert refused.json()["detail"] == "this workflow spends 100 tokens in 3600000 ms"
    assert refused.headers["RateLimit-Limit"] == "100"
    missing = spent + RESERVED - 100
    assert abs(int(refused.headers["Retry-After"]) - missing * 36) <= 36
    assert await debt(api) == spent


async def test_a_burst_is_held_to_what_it_may_write(api: Api) -> None:
    await define(api, LIMIT, HOLD)
    answers = await asyncio.gather(
        *(run(api, "/v1/execute/async", timeout=60_000) for _ in range(8))
    )
    accepted = [one.json()["id"] for one in answers if one.status_code == 202]
    assert len(accepted) == LIMIT["tokens"] // RESERVED
    for execution_id in accepted:
        await api.http.post(f"/v1/executions/{execution_id}/cancel")
    await until_debt(api, 0)  # they spent nothing
    assert (await run(api, "/v1/execute/async")).status_code == 202


async def test_where_starts_are_refused_no_token_is_taken(api: Api) -> None:
    await define(api, {**LIMIT, "requests": 1})
    await run(api)
    await until_debt(api, USED)
    refused = await run(api)
    assert (refused.status_code, refused.headers["RateLimit-Limit"]) == (429, "1")
    assert await debt(api) == USED


async def test_failed_attempts_count_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {**ASK, "generate": {**ASK["generate"], "output_schema": {"type": "object"}}}
    document = {"rateLimit": LIMIT, "steps": [schema]}
    assert (await api.http.put("/v1/workflows/rated", json=document)).status_code == 201
    assert (await run(api)).json()["status"] == "failed"  # three small tokens are no JSON
    await until_debt(api, USED)


async def test_an_async_caller_starts_when_there_is_room(api: Api) -> None:
    await define(api, {"tokens": RESERVED, "window": "1200ms"})
    started = [(await run(api, "/v1/execute/async")).json()["id"] for _ in range(2)]
    records = []
    async with asyncio.timeout(20):
        for execution_id in started:
            record: dict[str, Any] = {}
            while record.get("status") != "completed":
                await asyncio.sleep(0.02)
                record = (await api.http.get(f"/v1/executions/{execution_id}")).json()
            records.append(record)
    assert records[1]["timing"]["queuedMs"] > records[0]["timing"]["queuedMs"] + 300


async def test_what_is_told_twice_is_charged_once(bench: StoreBench) -> None:
    rate = Rate("00000000" + "a" * 24, 100, WINDOW_MS)
    body = json.dumps({"rate": rate.name, "tokens": 100, "window_ms": WINDOW_MS, "used": 60})
    for _ in range(2):
        await bench.calls.fcall("ip1_gate", "ip:{0}", "exe_00a/tokens/7", "gate", body)
    left = float(await bench.client.get(f"ip:{{0}}:rate:{rate.name}"))
    ttl_ms = await bench.client.pttl(f"ip:{{0}}:rate:{rate.name}")
    assert 0.59 * WINDOW_MS < ttl_ms <= 0.6 * WINDOW_MS
    assert left > 0


@pytest.mark.parametrize("count_max", [1, 7, 1000, 10**7])
async def test_a_rate_gives_its_count_and_not_one_more(bench: StoreBench, count_max: int) -> None:
    gates = RedisGates(bench.calls, partition_count=4)
    rate = Rate("00000000" + "b" * 24, count_max, WINDOW_MS)
    share = max(1, count_max // 5)
    given = 0
    while await gates.take_rate(rate, share, 0) == 0:
        given += share
    assert count_max - share < given <= count_max
    assert await gates.take_rate(rate, -given, 0) == 0
    assert await bench.client.get(f"ip:{{0}}:rate:{rate.name}") is None

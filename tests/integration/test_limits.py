"""Limits of keys: counted before any work, told on every answer, renewed with the window."""

import asyncio

import pytest

from serve_app.adapters.redis_limits import RedisLimits
from serve_app.core.limits import Limit, Limits
from serve_app.services import limits as limits_module
from tests.integration.conftest import StoreBench
from tests.support.api import Api

CHAT = {"workflowId": "chat-assistant", "input": {"messages": [{"role": "user", "content": "hi"}]}}
MINUTE = 60_000


async def test_a_limited_key_is_told_where_it_stands_and_then_refused(api: Api) -> None:
    limited = await api.new_key("execute", rateLimit={"requests": 2, "window": "60s"})
    first = await api.http.get("/v1/workflows", headers=limited)
    assert first.status_code == 200
    assert first.headers["RateLimit-Limit"] == "2"
    assert first.headers["RateLimit-Remaining"] == "1"
    assert 1 <= int(first.headers["RateLimit-Reset"]) <= 60
    unknown = await api.http.get("/v1/executions/exe_none", headers=limited)
    assert (unknown.status_code, unknown.headers["RateLimit-Remaining"]) == (404, "0")
    refused = await api.http.post("/v1/execute", json=CHAT, headers=limited)
    assert (refused.status_code, refused.json()["code"]) == (429, "RATE_LIMIT_EXCEEDED")
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert refused.headers["Retry-After"] == refused.headers["RateLimit-Reset"]
    assert (await api.http.get("/v1/executions")).json()["items"] == []  # nothing was begun


async def test_an_unlimited_key_costs_no_look_and_is_told_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        raise AssertionError("asked the store")

    monkeypatch.setattr(RedisLimits, "take", never)
    answer = await api.http.get("/v1/workflows")
    assert answer.status_code == 200
    assert not any(name.lower().startswith("ratelimit") for name in answer.headers)


async def test_tokens_spent_refuse_the_next_request(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_module, "SPENT_BELIEVED_S", 0)
    limited = await api.new_key("execute", tokenLimit={"tokens": 20, "window": "1h"})
    remaining = []
    for _ in range(3):  # 14 tokens each: the second crosses the limit and is finished
        answer = await api.http.post("/v1/execute", json=CHAT, headers=limited)
        remaining.append((answer.status_code, answer.headers["RateLimit-Remaining"]))
    assert remaining == [(200, "20"), (200, "6"), (429, "0")]
    assert "tokens" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("wish", "shown"),
    [
        ({"rateLimit": {"requests": 5, "window": "1m"}, "tokenLimit": 9}, MINUTE),
        ({"tokenLimit": 9}, MINUTE),
        ({"rateLimit": {"requests": 5, "window": 1500}, "tokenLimit": 9}, 1500),
    ],
)
async def test_a_bare_number_of_tokens_counts_in_the_window_of_requests(
    api: Api, wish: dict[str, object], shown: int
) -> None:
    await api.new_key("read", **wish)
    record = (await api.http.get("/v1/keys")).json()["items"][-1]
    assert record["tokenLimit"] == {"tokens": 9, "window": shown}


@pytest.mark.parametrize(
    "wish",
    [
        {"rateLimit": {"requests": 0, "window": "1m"}},
        {"rateLimit": {"requests": 1, "window": "32d"}},
        {"rateLimit": {"requests": 1, "window": "soon"}},
        {"rateLimit": {"requests": 1}},
        {"tokenLimit": 0},
        {"tokenLimit": {"tokens": True, "window": 1}},
    ],
)
async def test_a_limit_that_makes_no_sense_is_refused(api: Api, wish: dict[str, object]) -> None:
    body = {"name": "t", "scopes": ["read"], **wish}
    assert (await api.http.post("/v1/keys", json=body)).status_code == 422


async def test_requests_at_once_get_the_limit_and_no_more(bench: StoreBench) -> None:
    limits = RedisLimits(bench.calls)
    wanted = Limits(Limit(10, MINUTE))
    standings = await asyncio.gather(*(limits.take("w", "k", wanted, 0) for _ in range(50)))
    assert sorted(s.remaining for s in standings if s.is_allowed) == list(range(10))
    assert (await limits.take("w", "other", wanted, 0)).remaining == 9
    assert (await limits.take("other", "k", wanted, 0)).remaining == 9


async def test_the_next_window_begins_anew(bench: StoreBench) -> None:
    limits, wanted = RedisLimits(bench.calls), Limits(Limit(1, 150), Limit(5, 150))
    assert (await limits.take("w", "k", wanted, 100)).is_allowed
    refused = await limits.take("w", "k", wanted, 105)
    assert (refused.is_allowed, refused.kind) == (False, "tokens")
    await asyncio.sleep(refused.reset_ms / 1000 + 0.002)
    assert (await limits.take("w", "k", wanted, 105)).is_allowed
    assert (await limits.take("w", "k2", wanted, 0)).is_allowed
    # A sum that was forgotten begins a window too, and does not lend tokens.
    assert (await limits.take("w", "k2", Limits(None, Limit(5, MINUTE)), 90)).is_allowed is False
    assert (await limits.take("w", "k2", Limits(None, Limit(5, MINUTE)), 0)).remaining == 5


async def test_the_default_limit_is_for_keys_without_their_own(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.services.limits, "_default", Limits(Limit(1, MINUTE)))
    own = {"name": "t", "scopes": ["read"], "rateLimit": {"requests": 7, "window": "1m"}}
    made = await api.http.post("/v1/keys", json=own)
    assert made.headers["RateLimit-Limit"] == "1"
    assert (await api.http.get("/v1/keys")).status_code == 429
    headers = {"Authorization": f"Bearer {made.json()['key']}"}
    answer = await api.http.get("/v1/workflows", headers=headers)
    assert answer.headers["RateLimit-Limit"] == "7"

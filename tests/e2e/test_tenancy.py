"""What tenants and operators rely on, through the real proxy and all processes."""

import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import API_KEY, Service

CHAT = {
    "workflowId": "chat-assistant",
    "input": {"messages": [{"role": "user", "content": "Say hello."}], "maxTokens": 5},
}
MOVED_WITHIN_S = 20  # three times what processes take to publish


@pytest.fixture
def http(service: Service):
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client


def counters(http: httpx.Client) -> dict[str, float]:
    """The sum over processes and labels of each sample."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def test_metrics_of_every_process_move(http: httpx.Client) -> None:
    before = counters(http)
    result = http.post("/v1/execute", json=CHAT).json()
    assert result["status"] == "completed"
    wanted = {
        "inferpipe_http_requests_total": 1,
        "inferpipe_executions_ended_total": 1,
        "vllm:prompt_tokens_total": result["usage"]["promptTokens"],
        "vllm:generation_tokens_total": result["usage"]["completionTokens"],
        "vllm:e2e_request_latency_seconds_count": 1,
    }
    give_up = time.monotonic() + MOVED_WITHIN_S
    while True:
        after = counters(http)
        if all(after.get(name, 0) - before.get(name, 0) >= by for name, by in wanted.items()):
            break
        assert time.monotonic() < give_up, {name: after.get(name) for name in wanted}
        time.sleep(0.5)
    assert after["inferpipe_links_open"] >= 1


def test_usage_counts_what_the_engine_counted(http: httpx.Client) -> None:
    made = http.post("/v1/keys", json={"name": "usage", "scopes": ["execute"]}).json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    usage = http.post("/v1/execute", json=CHAT, headers=headers).json()["usage"]
    items = http.get("/v1/usage", params={"groupBy": "key"}).json()["items"]
    [mine] = [item for item in items if item["key"] == made["id"]]
    assert (mine["requests"], mine["wastedTokens"]) == (1, 0)
    assert {name: mine[name] for name in usage} == usage


def test_a_stream_token_opens_its_stream_and_is_in_no_log(
    http: httpx.Client, service: Service
) -> None:
    execution_id = http.post("/v1/execute", json=CHAT).json()["id"]
    path = f"/v1/executions/{execution_id}/stream"
    key = {"Idempotency-Key": f"token-of-{execution_id}"}
    made = http.post("/v1/stream-tokens", json={"resource": path}, headers=key)
    token = made.json()["token"]
    foreign = {"Origin": "https://example.com"}  # no developer on this machine
    with httpx.Client(base_url=service.url, headers=foreign, timeout=30) as browser:
        opened = browser.get(path, params={"token": token})
        assert opened.status_code == 200
        assert "event: execution.completed" in opened.text
        assert browser.get("/v1/executions", params={"token": token}).status_code == 401
    again = http.post("/v1/stream-tokens", json={"resource": path}, headers=key)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json()["secretShown"] is True
    logs = [file for file in Path(service.data_dir).rglob("*") if file.suffix in {".log", ".txt"}]
    assert logs
    assert not any(token in file.read_text(errors="replace") for file in logs)


def test_a_limit_holds_through_the_proxy(http: httpx.Client) -> None:
    wish = {"name": "l", "scopes": ["read"], "rateLimit": {"requests": 1, "window": "60s"}}
    headers = {"Authorization": f"Bearer {http.post('/v1/keys', json=wish).json()['key']}"}
    first = http.get("/v1/workflows", headers=headers)
    assert (first.status_code, first.headers["RateLimit-Remaining"]) == (200, "0")
    refused = http.get("/v1/workflows", headers=headers)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1

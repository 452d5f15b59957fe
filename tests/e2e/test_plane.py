"""The model plane behind the API: what the router decided, and what came of it."""

import time

import httpx
import pytest

from inferpipe.wire import DecisionList, DecisionView
from tests.e2e.conftest import API_KEY, Service


@pytest.mark.timeout(60)
def test_a_decision_shows_what_was_expected_and_what_came(service: Service) -> None:
    system = "You answer in one word. " * 30
    asked = {
        "workflowId": "chat-assistant",
        "input": {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": "Name a colour."},
            ],
            "maxTokens": 3,
            "temperature": 0,
        },
    }
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=50) as http:
        ids = [http.post("/v1/execute", json=asked).json()["id"] for _ in range(2)]

        def decisions() -> list[DecisionView]:
            answer = http.get("/v1/hosts/decisions", params={"limit": 50})
            items = DecisionList.model_validate(answer.json()).items
            found = {one.request_id.partition("/")[0]: one for one in items}
            return [found[execution_id] for execution_id in ids]

        while any(one.ttft_ms is None for one in decisions()):  # the next report says it
            time.sleep(0.05)
        first, second = decisions()
    assert first.host_id == second.host_id
    assert second.expected_cached_tokens > 100
    assert second.cached_tokens is not None
    assert second.cached_tokens >= 128  # a block of the CPU engine
    assert second.ttft_ms is not None
    assert second.ttft_ms > 0

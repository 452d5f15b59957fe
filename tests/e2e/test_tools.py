"""Tools with the real model: the grammar holds its calls to the tool's schema."""

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import API_KEY, Service


@pytest.fixture
def http(service: Service) -> Any:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client


def definition(**settings: Any) -> dict[str, Any]:
    tool = {
        "name": "get_weather",
        "description": "Says the weather of a city.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"enum": ["Paris", "Oslo", "Rome"]}},
            "additionalProperties": False,
        },
        "step": {"transform": {"city": "{{ args.city }}", "weather": "sunny"}},
    }
    asked = {
        "prompt": "What is the weather in Paris?",
        "temperature": 0,
        "max_tokens": 40,
        "max_tool_rounds": 1,
        "tools": [tool],
        **settings,
    }
    return {"steps": [{"id": "ask", "generate": asked}]}


def result_of(http: httpx.Client, **settings: Any) -> dict[str, Any]:
    put = http.put("/v1/workflows/weather-talk", json=definition(**settings))
    assert put.status_code in (200, 201), put.text
    result = http.post("/v1/execute", json={"workflowId": "weather-talk", "input": {}}).json()
    assert result["status"] == "completed", result
    record: dict[str, Any] = http.get(f"/v1/executions/{result['id']}").json()
    return record


def test_a_forced_call_is_made_and_its_result_answered_from(http: httpx.Client) -> None:
    record = result_of(http, tool_choice="required")
    steps = {step["id"]: step for step in record["steps"]}
    assert steps["ask/0/ask.get_weather"]["output"]["weather"] == "sunny"
    assert steps["ask/0/ask.get_weather"]["output"]["city"] in ("Paris", "Oslo", "Rome")
    assert record["data"]
    assert "ask/1/ask.model" in steps
    assert record["usage"]["completionTokens"] > 10


def test_a_free_choice_gives_a_call_or_an_answer(http: httpx.Client) -> None:
    record = result_of(http)
    assert isinstance(record["data"], str)
    assert record["data"]

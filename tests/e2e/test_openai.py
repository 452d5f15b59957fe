"""OpenAI's API of the running service, behind its proxy, with the unmodified client."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import redis
from openai import AsyncOpenAI, OpenAI

from tests.e2e.conftest import API_KEY, Service

MODEL = "SmolLM2-135M-Instruct"
CAPITAL: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 20,
}
LONG: dict[str, Any] = {
    **CAPITAL,
    "messages": [{"role": "user", "content": "Tell me a very long story about a ship."}],
    "max_tokens": 2000,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key=API_KEY, max_retries=0) as opened:
        yield opened


def running_count(service: Service) -> int:
    """Requests in the engine, as its replica last reported."""
    url = json.loads((service.data_dir / "valkey" / "endpoint.json").read_text())["url"]
    with redis.Redis.from_url(url) as store:
        (key,) = store.scan_iter("ip:{config}:replicas", count=1000)
        reports = [json.loads(report) for report in store.hvals(key)]
    return sum(report["load"]["running_count"] for report in reports)


def wait_running(service: Service, count: int, within_s: float = 20) -> None:
    give_up = time.monotonic() + within_s
    while running_count(service) != count:
        assert time.monotonic() < give_up, f"{running_count(service)} run, not {count}"
        time.sleep(0.05)


def test_the_model_knows_a_capital(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.chat.completions.create(**CAPITAL)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 1
    stream = client.chat.completions.create(**CAPITAL, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in stream)
    assert text == answer.choices[0].message.content


def test_tool_call_and_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    wish = {**CAPITAL, "max_tokens": 120, "parallel_tool_calls": False}
    answer = client.chat.completions.create(
        **wish, tools=[tool], tool_choice={"type": "function", "function": {"name": "weather"}}
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    told = client.chat.completions.create(
        **CAPITAL,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )
    assert json.loads(told.choices[0].message.content or "")["city"] in {"Paris", "Rome"}


def test_keyless_developer_and_wrong_key(service: Service) -> None:
    # The client insists on a key; without one, the header is left out.
    with OpenAI(base_url=f"{service.url}/v1", api_key="-", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(**CAPITAL)
        keyless = {"extra_headers": {"Authorization": openai.Omit()}}
        assert stranger.chat.completions.create(**CAPITAL, **keyless).choices
        with pytest.raises(openai.NotFoundError, match=MODEL):
            stranger.chat.completions.create(**{**CAPITAL, "model": "other"}, **keyless)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_leaving_caller_frees_the_engine(service: Service, *, is_streamed: bool) -> None:
    wait_running(service, 0)

    async def read() -> None:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key=API_KEY) as client:
            answer: Any = await client.chat.completions.create(**LONG, stream=is_streamed)
            if is_streamed:
                async for _ in answer:
                    pass

    reader = asyncio.ensure_future(read())
    await asyncio.to_thread(wait_running, service, 1)
    reader.cancel()
    await asyncio.wait((reader,))
    # 2,000 tokens would take half a minute; the replica reports twice a second.
    await asyncio.to_thread(wait_running, service, 0, within_s=5)

"""Answers as clients read them, over each surface that streams: what they said, and when.

One `Asked` is one question; asked again it gives the same answer, so that a disturbed run can be
compared with a calm one.
"""

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.asyncio.client import connect

SCHEMA = {
    "type": "array",
    "minItems": 20,
    "maxItems": 20,
    "items": {"type": "string", "minLength": 5, "maxLength": 9},
}
WORDS = "of the sea, the moon and an old clock in a tower"
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1, "seed": 11},
    "form": {
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA}},
    },
}
WORKFLOW = {"greedy": "story", "seeded": "dice", "form": "form"}  # of tests/chaos/conftest.py


@dataclass(frozen=True)
class Asked:
    """One question.

    Args:
        surface: execute, openai or socket; the last has the mode greedy alone.
        mode: greedy, seeded or form, which is an array of strings as JSON.
    """

    surface: str
    mode: str
    topic: str


@dataclass
class Heard:
    """An answer: its texts, and when each came, in monotonic seconds."""

    asked: Asked
    texts: list[str] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    completion_tokens: int = 0
    execution_id: str = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def gap_s(self, moment_s: float) -> float | None:
        """From the last text before a moment to the first after it; None: one is missing."""
        before = [at for at in self.at_s if at <= moment_s]
        after = [at for at in self.at_s if at > moment_s]
        return min(after) - max(before) if before and after else None

    def usual_gap_s(self) -> float:
        gaps = sorted(b - a for a, b in zip(self.at_s, self.at_s[1:], strict=False))
        return gaps[len(gaps) // 2] if gaps else 0.0

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.at_s.append(time.monotonic())


async def ask(
    http: httpx.AsyncClient, asked: Asked, seen: Callable[[Heard], None] = lambda _: None
) -> Heard:
    """Ask and read to the end; `seen` is shown the answer so far after each text."""
    heard = Heard(asked)
    ways = {"execute": _execute, "openai": _openai, "socket": _socket}
    async for text in ways[asked.surface](http, heard):
        if text:
            heard.add(text)
            seen(heard)
    return heard


async def _execute(http: httpx.AsyncClient, heard: Heard) -> AsyncIterator[str]:
    asked = heard.asked
    body = {"workflowId": WORKFLOW[asked.mode], "input": {"topic": asked.topic}}
    async with http.stream("POST", "/v1/execute/stream", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for event in _data_of(answer):
            heard.execution_id = event.get("executionId", heard.execution_id)
            if isinstance(event.get("data"), str) and "step" in event:
                yield event["data"]
            if "status" in event:
                assert event["status"] == "completed", event
                heard.completion_tokens = event["usage"]["completionTokens"]


async def _openai(http: httpx.AsyncClient, heard: Heard) -> AsyncIterator[str]:
    asked = heard.asked
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"Tell {asked.topic} {WORDS}."}],
        "max_tokens": 400 if asked.mode == "form" else 250,
        "stream": True,
        "stream_options": {"include_usage": True},
        **MODES[asked.mode],
    }
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for event in _data_of(answer):
            assert "error" not in event, event
            if event.get("usage"):
                heard.completion_tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


async def _socket(http: httpx.AsyncClient, heard: Heard) -> AsyncIterator[str]:
    url = str(http.base_url.copy_with(scheme="ws")).rstrip("/") + "/v1/ws"
    headers = {"Authorization": http.headers["Authorization"]}
    prompt = f"Tell {heard.asked.topic} {WORDS}!"
    request = {"prompt": prompt, "max_tokens": 250, "temperature": 0, "stream": True}
    async with connect(url, additional_headers=headers) as socket:
        await socket.send(json.dumps({"type": "inference", "request": request}))
        async for raw in socket:
            message = json.loads(raw)
            assert message["type"] in {"stream_chunk", "stream_end"}, message
            if message["type"] == "stream_end":
                heard.completion_tokens = message["usage"]["completion_tokens"]
                return
            yield message["content"]


async def _data_of(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        name, _, value = line.partition(":")
        if name == "data" and value.strip() != "[DONE]":
            yield json.loads(value)

"""A scripted HTTP server below both clients: what they send is kept, what they get is scripted."""

import asyncio
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import httpx

from inferpipe import AsyncInferPipe, InferPipe

RESULT = {"id": "e1", "status": "completed", "data": {"message": "hi"}, "workflowId": "test-echo",
          "workflowVersion": 1}  # fmt: skip
Outcome = httpx.Response | Exception


@dataclass
class Server:
    """Answers with the scripted outcomes in turn, the last one for ever; keeps the requests."""

    outcomes: list[Outcome]
    requests: list[httpx.Request] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        outcome = self.outcomes[min(len(self.requests), len(self.outcomes)) - 1]
        if isinstance(outcome, Exception):
            raise type(outcome)(*outcome.args)
        # A response is used up by one client; the script is shared by two and by retries.
        return httpx.Response(outcome.status_code, headers=outcome.headers, content=outcome.content)

    async def async_sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


Ask = Callable[..., Any]


def asker(kind: str) -> Ask:
    """ask(server, method, *args, **kwargs) makes one call on a fresh client of either kind.

    What the call yields, if it is a list or a stream, is read to its end.
    """

    def ask_sync(server: Server, method: str, *args: Any, config: Any = (), **kwargs: Any) -> Any:
        with InferPipe(
            transport=httpx.MockTransport(server),
            sleep=server.slept.append,
            jitter=lambda: 0.5,
            **dict(config),
        ) as client:
            answer = attrgetter(method)(client)(*args, **kwargs)
            return list(answer) if inspect.isgenerator(answer) else answer

    def ask_async(server: Server, method: str, *args: Any, config: Any = (), **kwargs: Any) -> Any:
        async def call() -> Any:
            async with AsyncInferPipe(
                transport=httpx.MockTransport(server),
                sleep=server.async_sleep,
                jitter=lambda: 0.5,
                **dict(config),
            ) as client:
                answer = attrgetter(method)(client)(*args, **kwargs)
                if inspect.isasyncgen(answer):
                    return [item async for item in answer]
                return await answer

        return asyncio.run(call())

    return ask_sync if kind == "sync" else ask_async


def problem(status: int, code: str, **members: Any) -> httpx.Response:
    body = {"type": "about:blank", "title": "T", "status": status, "detail": "D", "code": code}
    headers = members.pop("headers", {})
    return httpx.Response(
        status,
        headers={"content-type": "application/problem+json", **headers},
        content=json.dumps({**body, "requestId": "r1", **members}),
    )


def ok(body: object = RESULT, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=body)

"""Effects performed over httpx: the sync and the async runner of scripts.

Owns every httpx call. Invariant: no httpx error leaves this module; a failed request is the
reply `Unreachable`, and what that means is decided in `_stream`.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import httpx

from inferpipe._calls import CONNECT_TIMEOUT_MAX_S, Answer, Call, ClientConfig, HttpOptions
from inferpipe._stream import Effect, Open, Read, Reply, Script, Send, Sleep, Unreachable

T = TypeVar("T")

Sleeper = Callable[[float], object]
AsyncSleeper = Callable[[float], Awaitable[object]]

sleep: Sleeper = time.sleep
async_sleep: AsyncSleeper = asyncio.sleep
jitter: Callable[[], float] = random.random  # nothing secret hangs on it


class Runner:
    """Runs scripts: performs each effect and sends back the reply."""

    def __init__(self, http: httpx.Client, config: ClientConfig, sleep: Sleeper) -> None:
        self._http = http
        self._config = config
        self._sleep = sleep

    def for_stream(self) -> "StreamRunner":
        """Return a runner that holds one open stream."""
        return StreamRunner(self._http, self._config, self._sleep)

    def run(self, script: Script[T]) -> T:
        """Run the script to its end; return what it returns, raise what it raises."""
        reply: Reply = None
        while True:
            try:
                effect = script.send(reply)
            except StopIteration as stop:
                value: T = stop.value
                return value
            try:
                reply = self._perform(effect)
            except httpx.RequestError as error:
                reply = _unreachable(error)

    def _perform(self, effect: Effect) -> Reply:
        match effect:
            case Send(call):
                return _answer(self._http.send(_request(self._http, call, self._config)))
            case Sleep(seconds):
                self._sleep(seconds)
                return None
            case _:
                raise AssertionError(f"not outside a stream: {effect}")


class StreamRunner(Runner):
    """Runs one stream's scripts: holds the response that is open."""

    _response: httpx.Response | None = None
    _body: Iterator[bytes] = iter(())

    def close(self) -> None:
        """Close the open response, if there is one."""
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def _perform(self, effect: Effect) -> Reply:
        match effect:
            case Open(call):
                self.close()
                request = _request(self._http, call, self._config)
                response = self._http.send(request, stream=True)
                self._response = response
                if response.status_code != httpx.codes.OK:
                    response.read()
                    return _answer(response)
                self._body = response.iter_bytes()
                return Answer(response.status_code, response.headers)
            case Read():
                return next(self._body, b"")
            case _:
                return super()._perform(effect)


class AsyncRunner:
    """`Runner` for asyncio."""

    def __init__(self, http: httpx.AsyncClient, config: ClientConfig, sleep: AsyncSleeper) -> None:
        self._http = http
        self._config = config
        self._sleep = sleep

    def for_stream(self) -> "AsyncStreamRunner":
        """Return a runner that holds one open stream."""
        return AsyncStreamRunner(self._http, self._config, self._sleep)

    async def run(self, script: Script[T]) -> T:
        """Run the script to its end; return what it returns, raise what it raises."""
        reply: Reply = None
        while True:
            try:
                effect = script.send(reply)
            except StopIteration as stop:
                value: T = stop.value
                return value
            try:
                reply = await self._perform(effect)
            except httpx.RequestError as error:
                reply = _unreachable(error)

    async def _perform(self, effect: Effect) -> Reply:
        match effect:
            case Send(call):
                return _answer(await self._http.send(_request(self._http, call, self._config)))
            case Sleep(seconds):
                await self._sleep(seconds)
                return None
            case _:
                raise AssertionError(f"not outside a stream: {effect}")


class AsyncStreamRunner(AsyncRunner):
    """`StreamRunner` for asyncio."""

    _response: httpx.Response | None = None
    _body: AsyncIterator[bytes]

    async def aclose(self) -> None:
        """Close the open response, if there is one."""
        response, self._response = self._response, None
        if response is not None:
            await response.aclose()

    async def _perform(self, effect: Effect) -> Reply:
        match effect:
            case Open(call):
                await self.aclose()
                request = _request(self._http, call, self._config)
                response = await self._http.send(request, stream=True)
                self._response = response
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    return _answer(response)
                self._body = response.aiter_bytes()
                return Answer(response.status_code, response.headers)
            case Read():
                return await anext(self._body, b"")
            case _:
                return await super()._perform(effect)


def limits(options: HttpOptions) -> httpx.Limits:
    """Translate our pool settings into httpx's."""
    return httpx.Limits(
        max_connections=options.connections_max,
        max_keepalive_connections=options.connections_max if options.keepalive else 0,
        keepalive_expiry=options.keepalive_expiry_s,
    )


def _request(
    http: httpx.Client | httpx.AsyncClient, call: Call, config: ClientConfig
) -> httpx.Request:
    return http.build_request(
        call.method,
        call.path,
        headers=call.headers,
        content=call.content,
        timeout=httpx.Timeout(
            config.timeout,
            connect=min(config.timeout, CONNECT_TIMEOUT_MAX_S),
            read=max(config.timeout, call.patience_s),
        ),
    )


def _answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, response.headers, response.content)


def _unreachable(error: httpx.RequestError) -> Unreachable:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Unreachable(reason, isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout))

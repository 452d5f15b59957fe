"""Effects performed over httpx: the sync and the async runner of scripts.

Owns every httpx call, and the clock and chance of the client. Invariant: no httpx error leaves this
module; a failed request is the reply `Unreachable`, and what that means is decided in `_stream`.
"""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import httpx

from inferpipe._calls import Answer, Call, with_key
from inferpipe._config import CONNECT_TIMEOUT_MAX_S, ClientConfig, HttpOptions
from inferpipe._operation import Operation, Page, next_cursor
from inferpipe._stream import (
    Effect,
    Open,
    Read,
    Reply,
    RetryPolicy,
    Script,
    Send,
    Sleep,
    Unreachable,
    exchange,
)

T = TypeVar("T")

Sleeper = Callable[[float], object]
AsyncSleeper = Callable[[float], Awaitable[object]]

sleep: Sleeper = time.sleep
async_sleep: AsyncSleeper = asyncio.sleep
jitter: Callable[[], float] = random.random  # nothing secret hangs on it
monotonic_s: Callable[[], float] = time.monotonic


def new_key() -> str:
    """Return an `Idempotency-Key` that nobody else has."""
    return str(uuid.uuid4())


class Runner:
    """Runs scripts: performs each effect and sends back the reply."""

    def __init__(
        self, http: httpx.Client, config: ClientConfig, policy: RetryPolicy, sleep: Sleeper
    ) -> None:
        self.policy = policy
        self._http = http
        self._config = config
        self._sleep = sleep

    @property
    def base_url(self) -> str:
        """Where the server is."""
        return self._config.base_url

    @property
    def has_key(self) -> bool:
        """Whether calls carry a key."""
        return self._config.api_key is not None

    def for_stream(self) -> "StreamRunner":
        """Return a runner that holds one open stream."""
        return StreamRunner(self._http, self._config, self.policy, self._sleep)

    def ask(self, operation: Operation[T]) -> T:
        """Perform one operation; return what its answer means."""
        call = with_key(operation.call, new_key())
        return operation.read(self.run(exchange(Send(call), self.policy)))

    def items(self, page_after: Callable[[str | None], Operation[Page[T]]]) -> Iterator[T]:
        """Yield the items of all pages, each page when its first item is asked for."""
        cursor: str | None = None
        while True:
            page = self.ask(page_after(cursor))
            yield from page.items
            cursor = next_cursor(page, cursor)
            if cursor is None:
                return

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
                return self._send(call)
            case Sleep(seconds):
                self._sleep(seconds)
                return None
            case _:
                raise AssertionError(f"not outside a stream: {effect}")

    def _send(self, call: Call) -> Answer:
        patience = _Patience(self._config, call)
        request = _request(self._http, call, self._config)
        response = self._http.send(request, stream=True)
        try:
            content = b"".join([patience.checked(piece) for piece in response.iter_bytes()])
        finally:
            response.close()
        return Answer(response.status_code, response.headers, content)


class StreamRunner(Runner):
    """Runs one stream's scripts: holds the response that is open."""

    _response: httpx.Response | None = None
    _body: Iterator[bytes]

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

    def __init__(
        self,
        http: httpx.AsyncClient,
        config: ClientConfig,
        policy: RetryPolicy,
        sleep: AsyncSleeper,
    ) -> None:
        self.policy = policy
        self._http = http
        self._config = config
        self._sleep = sleep

    @property
    def base_url(self) -> str:
        """Where the server is."""
        return self._config.base_url

    @property
    def has_key(self) -> bool:
        """Whether calls carry a key."""
        return self._config.api_key is not None

    def for_stream(self) -> "AsyncStreamRunner":
        """Return a runner that holds one open stream."""
        return AsyncStreamRunner(self._http, self._config, self.policy, self._sleep)

    async def ask(self, operation: Operation[T]) -> T:
        """Perform one operation; return what its answer means."""
        call = with_key(operation.call, new_key())
        return operation.read(await self.run(exchange(Send(call), self.policy)))

    async def items(
        self, page_after: Callable[[str | None], Operation[Page[T]]]
    ) -> AsyncIterator[T]:
        """Yield the items of all pages, each page when its first item is asked for."""
        cursor: str | None = None
        while True:
            page = await self.ask(page_after(cursor))
            for item in page.items:
                yield item
            cursor = next_cursor(page, cursor)
            if cursor is None:
                return

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
                return await self._send(call)
            case Sleep(seconds):
                await self._sleep(seconds)
                return None
            case _:
                raise AssertionError(f"not outside a stream: {effect}")

    async def _send(self, call: Call) -> Answer:
        patience = _Patience(self._config, call)
        request = _request(self._http, call, self._config)
        response = await self._http.send(request, stream=True)
        try:
            content = b"".join([patience.checked(piece) async for piece in response.aiter_bytes()])
        finally:
            await response.aclose()
        return Answer(response.status_code, response.headers, content)


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


def client(config: ClientConfig, transport: httpx.BaseTransport | None) -> httpx.Client:
    """Return the connections of one sync client."""
    options = config.http_options
    return httpx.Client(
        limits=_limits(options),
        proxy=options.proxy,
        verify=options.verify,
        trust_env=False,
        transport=transport,
    )


def async_client(
    config: ClientConfig, transport: httpx.AsyncBaseTransport | None
) -> httpx.AsyncClient:
    """Return the connections of one async client."""
    options = config.http_options
    return httpx.AsyncClient(
        limits=_limits(options),
        proxy=options.proxy,
        verify=options.verify,
        trust_env=False,
        transport=transport,
    )


class _Patience:
    """How long one answer may take in all.

    A server that writes white space while it works (ours does, to learn whether the caller is
    still there) never trips a time-out between two reads, so the whole is bounded here.
    """

    def __init__(self, config: ClientConfig, call: Call) -> None:
        self._give_up_s = monotonic_s() + max(config.timeout, call.patience_s)

    def checked(self, piece: bytes) -> bytes:
        if monotonic_s() > self._give_up_s:
            raise httpx.ReadTimeout("no whole answer in time")
        return piece


def _limits(options: HttpOptions) -> httpx.Limits:
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
        config.url(call.path),
        headers={**config.headers, **call.headers},
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

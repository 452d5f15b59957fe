"""The SDK: `InferPipe` and its async twin.

Owns the public methods and nothing below them: what to send, when to send it again and what an
answer means is decided in `_calls` and `_stream`, and performed by `_http`. Invariant: the two
halves of this file differ only in `async` and `await`.
"""

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from inferpipe import _calls as calls
from inferpipe import _http as http
from inferpipe._stream import (
    RetryPolicy,
    Send,
    StreamChunk,
    StreamEvent,
    StreamSession,
    completed,
    exchange,
    to_chunk,
)
from inferpipe.wire import ExecutionInfo, ExecutionRecord, ExecutionResult, HealthStatus


class InferPipe:
    """A client for blocking code; threads may share it.

    Args:
        api_key: none is sent where it is None: the server's local development mode.
        workspace_id: sent along, so that a key of another workspace is refused.
        base_url: where the server is.
        timeout: seconds to wait for an answer; `execute` waits longer where its `timeout_ms` does.
        retries: further attempts after a failed connection, 429 or 503.
        http_options: the connection pool.
        transport: replaces the network, for tests and special set-ups.
        sleep: waits between attempts.
        jitter: draws from [0, 1).
    """

    def __init__(  # noqa: PLR0913 - settings, each with a default
        self,
        api_key: str | None = None,
        workspace_id: str | None = None,
        base_url: str = calls.DEFAULT_BASE_URL,
        *,
        timeout: float = calls.DEFAULT_TIMEOUT_S,
        retries: int = calls.DEFAULT_RETRIES,
        http_options: calls.HttpOptions | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: http.Sleeper = http.sleep,
        jitter: Callable[[], float] = http.jitter,
    ) -> None:
        options = http_options or calls.HttpOptions()
        config = calls.ClientConfig(api_key, workspace_id, base_url, timeout, retries, options)
        self._policy = RetryPolicy(retries, jitter)
        self._http = httpx.Client(
            base_url=base_url,
            headers=config.headers,
            limits=http.limits(options),
            transport=transport,
        )
        self._runner = http.Runner(self._http, config, sleep)

    @classmethod
    def from_env(
        cls,
        *,
        transport: httpx.BaseTransport | None = None,
        **options: Unpack[calls.ClientOptions],
    ) -> Self:
        """Read INFERPIPE_API_KEY, _WORKSPACE_ID and _BASE_URL; what is passed wins."""
        return cls(**_with_environment(options), transport=transport)

    def execute(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[calls.ExecuteOptions],
    ) -> ExecutionResult:
        """Run a workflow and wait for its end.

        Raises:
            ExecutionFailedError: it failed or was cancelled.
            InferPipeTimeoutError: no answer in time; the execution goes on.
        """
        call = calls.execute_call(calls.EXECUTE, workflow_id, input, options, _new_key())
        return completed(calls.read_model(self._answer(call), ExecutionResult))

    def execute_async(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[calls.ExecuteOptions],
    ) -> ExecutionInfo:
        """Start a workflow; return as soon as it is durably accepted."""
        call = calls.execute_call(calls.EXECUTE_ASYNC, workflow_id, input, options, _new_key())
        return calls.read_model(self._answer(call), ExecutionInfo)

    def execute_stream(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[calls.ExecuteOptions],
    ) -> "ExecutionStream":
        """Return a stream that starts the workflow when it is entered or iterated over."""
        call = calls.execute_call(calls.EXECUTE_STREAM, workflow_id, input, options, _new_key())
        return ExecutionStream(StreamSession(call, self._policy), self._runner.for_stream())

    def get_execution(self, execution_id: str) -> ExecutionRecord:
        """Return all that is known of an execution now."""
        answer = self._answer(calls.execution_call(execution_id))
        return calls.read_model(answer, ExecutionRecord)

    def cancel_execution(self, execution_id: str) -> None:
        """Ask for a cancellation; ConflictError where the execution has ended already."""
        self._answer(calls.cancel_call(execution_id, _new_key()))

    def health(self) -> HealthStatus:
        """Return the server's health; one that is not healthy is returned too, not raised."""
        return calls.read_health(self._answer(calls.health_call()))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self, call: calls.Call) -> calls.Answer:
        return self._runner.run(exchange(Send(call), self._policy))


class ExecutionStream:
    """An execution's text as it is generated: iterate over it, once.

    Dropped connections are mended unseen. The text of a step that is retried comes again: `result`
    has the final word, and `events()` tells of the retry. Leaving early does not cancel the
    execution; leave by `with` or `close`, so that the connection is given back at once.
    """

    def __init__(self, session: StreamSession, runner: http.StreamRunner) -> None:
        self._session = session
        self._runner = runner

    @property
    def execution_id(self) -> str | None:
        """The execution's id; None before the stream is open (`with` opens it)."""
        return self._session.execution_id

    @property
    def result(self) -> ExecutionResult:
        """The outcome, after the last event; InferPipeError before it."""
        return self._session.result

    def events(self) -> Iterator[StreamEvent]:
        """Yield every event, then raise ExecutionFailedError unless the execution completed."""
        try:
            while (event := self._runner.run(self._session.next_event())) is not None:
                yield event
        finally:
            self.close()

    def __iter__(self) -> Iterator[StreamChunk]:
        for event in self.events():
            chunk = to_chunk(event)
            if chunk is not None:
                yield chunk

    def close(self) -> None:
        """Give the connection back; the execution goes on."""
        self._runner.close()

    def __enter__(self) -> Self:
        try:
            self._runner.run(self._session.open())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncInferPipe:
    """`InferPipe` for asyncio, with the same arguments. Tasks of one event loop may share it.

    A cancelled call does not cancel its execution: `cancel_execution` does.
    """

    def __init__(  # noqa: PLR0913 - settings, each with a default
        self,
        api_key: str | None = None,
        workspace_id: str | None = None,
        base_url: str = calls.DEFAULT_BASE_URL,
        *,
        timeout: float = calls.DEFAULT_TIMEOUT_S,
        retries: int = calls.DEFAULT_RETRIES,
        http_options: calls.HttpOptions | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: http.AsyncSleeper = http.async_sleep,
        jitter: Callable[[], float] = http.jitter,
    ) -> None:
        options = http_options or calls.HttpOptions()
        config = calls.ClientConfig(api_key, workspace_id, base_url, timeout, retries, options)
        self._policy = RetryPolicy(retries, jitter)
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=config.headers,
            limits=http.limits(options),
            transport=transport,
        )
        self._runner = http.AsyncRunner(self._http, config, sleep)

    @classmethod
    def from_env(
        cls,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Unpack[calls.ClientOptions],
    ) -> Self:
        """Read INFERPIPE_API_KEY, _WORKSPACE_ID and _BASE_URL; what is passed wins."""
        return cls(**_with_environment(options), transport=transport)

    async def execute(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[calls.ExecuteOptions],
    ) -> ExecutionResult:
        """See `InferPipe.execute`."""
        call = calls.execute_call(calls.EXECUTE, workflow_id, input, options, _new_key())
        return completed(calls.read_model(await self._answer(call), ExecutionResult))

    async def execute_async(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[calls.ExecuteOptions],
    ) -> ExecutionInfo:
        """See `InferPipe.execute_async`."""
        call = calls.execute_call(calls.EXECUTE_ASYNC, workflow_id, input, options, _new_key())
        return calls.read_model(await self._answer(call), ExecutionInfo)

    def execute_stream(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[calls.ExecuteOptions],
    ) -> "AsyncExecutionStream":
        """See `InferPipe.execute_stream`; no `await` here: iterating does the waiting."""
        call = calls.execute_call(calls.EXECUTE_STREAM, workflow_id, input, options, _new_key())
        return AsyncExecutionStream(StreamSession(call, self._policy), self._runner.for_stream())

    async def get_execution(self, execution_id: str) -> ExecutionRecord:
        """See `InferPipe.get_execution`."""
        answer = await self._answer(calls.execution_call(execution_id))
        return calls.read_model(answer, ExecutionRecord)

    async def cancel_execution(self, execution_id: str) -> None:
        """See `InferPipe.cancel_execution`."""
        await self._answer(calls.cancel_call(execution_id, _new_key()))

    async def health(self) -> HealthStatus:
        """See `InferPipe.health`."""
        return calls.read_health(await self._answer(calls.health_call()))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _answer(self, call: calls.Call) -> calls.Answer:
        return await self._runner.run(exchange(Send(call), self._policy))


class AsyncExecutionStream:
    """`ExecutionStream` for asyncio."""

    def __init__(self, session: StreamSession, runner: http.AsyncStreamRunner) -> None:
        self._session = session
        self._runner = runner

    @property
    def execution_id(self) -> str | None:
        """The execution's id; None before the stream is open (`async with` opens it)."""
        return self._session.execution_id

    @property
    def result(self) -> ExecutionResult:
        """The outcome, after the last event; InferPipeError before it."""
        return self._session.result

    async def events(self) -> AsyncIterator[StreamEvent]:
        """Yield every event, then raise ExecutionFailedError unless the execution completed."""
        try:
            while (event := await self._runner.run(self._session.next_event())) is not None:
                yield event
        finally:
            await self.aclose()

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        async for event in self.events():
            chunk = to_chunk(event)
            if chunk is not None:
                yield chunk

    async def aclose(self) -> None:
        """Give the connection back; the execution goes on."""
        await self._runner.aclose()

    async def __aenter__(self) -> Self:
        try:
            await self._runner.run(self._session.open())
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def _with_environment(given: calls.ClientOptions) -> calls.ClientOptions:
    return calls.environment_options(os.environ, given)


def _new_key() -> str:
    return str(uuid.uuid4())

"""The SDK: `InferPipe` and its async twin.

Owns the public methods and nothing below them: what to send, when to send it again and what an
answer means is decided in `_operations`, `_calls` and `_stream`, and performed by `_http`.
Invariant: the two halves of this file differ only in `async` and `await`; a test compares them.
"""

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import httpx

from inferpipe import _http as http
from inferpipe import _operations as operations
from inferpipe import async_resources, resources
from inferpipe._calls import EXECUTE_STREAM, execute_call
from inferpipe._config import (
    DEFAULT_BASE_URL,
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_S,
    ClientConfig,
    ClientOptions,
    ExecuteOptions,
    HttpOptions,
    environment_options,
)
from inferpipe._stream import RetryPolicy
from inferpipe.errors import InvalidArgumentError
from inferpipe.streams import AsyncExecutionStream, ExecutionStream
from inferpipe.wire import (
    ExecutionInfo,
    ExecutionRecord,
    ExecutionResult,
    HealthStatus,
    UsageReport,
)


class InferPipe:
    """A client for blocking code; threads may share it.

    Args:
        api_key: none is sent where it is None: the server's local development mode.
        workspace_id: sent along, so that a key of another workspace is refused.
        base_url: where the server is.
        timeout: seconds to wait for an answer; `execute` waits longer where its `timeout_ms` does.
        retries: further attempts after a failed connection, 429 or 503.
        http_options: the connections; not beside `http_client`.
        http_client: your own connections, with all that httpx can be told; not closed by us.
        transport: replaces the network, for tests and special set-ups.
        sleep: waits between attempts.
        jitter: draws from [0, 1).
    """

    def __init__(  # noqa: PLR0913 - settings, each with a default
        self,
        api_key: str | None = None,
        workspace_id: str | None = None,
        base_url: str = DEFAULT_BASE_URL,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        http_options: HttpOptions | None = None,
        http_client: httpx.Client | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: http.Sleeper = http.sleep,
        jitter: Callable[[], float] = http.jitter,
    ) -> None:
        options = http_options or HttpOptions()
        config = ClientConfig(api_key, workspace_id, base_url, timeout, retries, options)
        if http_client is not None and (http_options or transport) is not None:
            raise InvalidArgumentError("http_client brings its own options and transport")
        self.config = config
        self._is_own = http_client is None
        self._http = http_client or http.client(config, transport)
        self._runner = http.Runner(self._http, config, RetryPolicy(retries, jitter), sleep)
        self.executions = resources.Executions(self._runner)
        self.workflows = resources.Workflows(self._runner)
        self.keys = resources.Keys(self._runner)
        self.workspaces = resources.Workspaces(self._runner)
        self.webhooks = resources.Webhooks(self._runner)
        self.stream_tokens = resources.StreamTokens(self._runner)
        self.hosts = resources.Hosts(self._runner)
        self.sessions = resources.Sessions(self._runner)

    @classmethod
    def from_env(
        cls,
        environment: str | None = None,
        *,
        http_client: httpx.Client | None = None,
        transport: httpx.BaseTransport | None = None,
        **options: Unpack[ClientOptions],
    ) -> Self:
        """Read INFERPIPE_API_KEY, _WORKSPACE_ID, _BASE_URL, _TIMEOUT_S and _RETRIES.

        What is passed wins. In an `environment` such as `staging`, named here or by
        INFERPIPE_ENVIRONMENT, each INFERPIPE_STAGING_* wins over its INFERPIPE_*.
        """
        found = environment_options(os.environ, options, environment)
        return cls(**found, http_client=http_client, transport=transport)

    @property
    def base_url(self) -> str:
        """Where the server is."""
        return self._runner.base_url

    @property
    def has_key(self) -> bool:
        """Whether calls carry a key."""
        return self._runner.has_key

    def execute(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[ExecuteOptions],
    ) -> ExecutionResult:
        """Run a workflow and wait for its end.

        Raises:
            ExecutionFailedError: it failed or was cancelled.
            InferPipeTimeoutError: no answer in time; the execution goes on.
        """
        return self._runner.ask(operations.execute(workflow_id, input, options))

    def execute_async(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[ExecuteOptions],
    ) -> ExecutionInfo:
        """Start a workflow; return as soon as it is durably accepted."""
        return self._runner.ask(operations.execute_async(workflow_id, input, options))

    def execute_stream(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[ExecuteOptions],
    ) -> ExecutionStream:
        """Return a stream that starts the workflow when it is entered or iterated over."""
        call = execute_call(EXECUTE_STREAM, workflow_id, input, options)
        return ExecutionStream(call, self._runner)

    def get_execution(self, execution_id: str) -> ExecutionRecord:
        """Return all that is known of an execution now; the same as `executions.get`."""
        return self.executions.get(execution_id)

    def cancel_execution(self, execution_id: str) -> None:
        """Ask for a cancellation; the same as `executions.cancel`."""
        self.executions.cancel(execution_id)

    def usage(
        self,
        *,
        from_: datetime | None = None,
        to: datetime | None = None,
        group_by: Literal["workflow", "key", "day"] | None = None,
    ) -> UsageReport:
        """Return the workspace's tokens between two moments, by workflow, key or day."""
        return self._runner.ask(operations.usage(from_, to, group_by))

    def health(self) -> HealthStatus:
        """Return the server's health; one that is not healthy is returned too, not raised."""
        return self._runner.ask(operations.health())

    def close(self) -> None:
        """Close the connections."""
        if self._is_own:
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


class AsyncInferPipe:
    """`InferPipe` for asyncio, with the same arguments. Tasks of one event loop may share it.

    A cancelled call does not cancel its execution: `executions.cancel` does.
    """

    def __init__(  # noqa: PLR0913 - settings, each with a default
        self,
        api_key: str | None = None,
        workspace_id: str | None = None,
        base_url: str = DEFAULT_BASE_URL,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        http_options: HttpOptions | None = None,
        http_client: httpx.AsyncClient | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: http.AsyncSleeper = http.async_sleep,
        jitter: Callable[[], float] = http.jitter,
    ) -> None:
        options = http_options or HttpOptions()
        config = ClientConfig(api_key, workspace_id, base_url, timeout, retries, options)
        if http_client is not None and (http_options or transport) is not None:
            raise InvalidArgumentError("http_client brings its own options and transport")
        self.config = config
        self._is_own = http_client is None
        self._http = http_client or http.async_client(config, transport)
        self._runner = http.AsyncRunner(self._http, config, RetryPolicy(retries, jitter), sleep)
        self.executions = async_resources.AsyncExecutions(self._runner)
        self.workflows = async_resources.AsyncWorkflows(self._runner)
        self.keys = async_resources.AsyncKeys(self._runner)
        self.workspaces = async_resources.AsyncWorkspaces(self._runner)
        self.webhooks = async_resources.AsyncWebhooks(self._runner)
        self.stream_tokens = async_resources.AsyncStreamTokens(self._runner)
        self.hosts = async_resources.AsyncHosts(self._runner)
        self.sessions = async_resources.AsyncSessions(self._runner)

    @classmethod
    def from_env(
        cls,
        environment: str | None = None,
        *,
        http_client: httpx.AsyncClient | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Unpack[ClientOptions],
    ) -> Self:
        """See `InferPipe.from_env`."""
        found = environment_options(os.environ, options, environment)
        return cls(**found, http_client=http_client, transport=transport)

    @property
    def base_url(self) -> str:
        """Where the server is."""
        return self._runner.base_url

    @property
    def has_key(self) -> bool:
        """Whether calls carry a key."""
        return self._runner.has_key

    async def execute(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[ExecuteOptions],
    ) -> ExecutionResult:
        """See `InferPipe.execute`."""
        return await self._runner.ask(operations.execute(workflow_id, input, options))

    async def execute_async(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[ExecuteOptions],
    ) -> ExecutionInfo:
        """See `InferPipe.execute_async`."""
        return await self._runner.ask(operations.execute_async(workflow_id, input, options))

    def execute_stream(
        self,
        workflow_id: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's word
        **options: Unpack[ExecuteOptions],
    ) -> AsyncExecutionStream:
        """See `InferPipe.execute_stream`; no `await` here: iterating does the waiting."""
        call = execute_call(EXECUTE_STREAM, workflow_id, input, options)
        return AsyncExecutionStream(call, self._runner)

    async def get_execution(self, execution_id: str) -> ExecutionRecord:
        """See `InferPipe.get_execution`."""
        return await self.executions.get(execution_id)

    async def cancel_execution(self, execution_id: str) -> None:
        """See `InferPipe.cancel_execution`."""
        await self.executions.cancel(execution_id)

    async def usage(
        self,
        *,
        from_: datetime | None = None,
        to: datetime | None = None,
        group_by: Literal["workflow", "key", "day"] | None = None,
    ) -> UsageReport:
        """See `InferPipe.usage`."""
        return await self._runner.ask(operations.usage(from_, to, group_by))

    async def health(self) -> HealthStatus:
        """See `InferPipe.health`."""
        return await self._runner.ask(operations.health())

    async def aclose(self) -> None:
        """Close the connections."""
        if self._is_own:
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

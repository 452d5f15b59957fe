"""An execution's events as they happen, for blocking code and for asyncio.

Owns the two stream classes that users hold; cursors and reconnects are `_stream`'s. Invariant: the
two halves of this file differ only in `async` and `await`.
"""

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

from inferpipe._calls import Call, with_key
from inferpipe._http import AsyncRunner, Runner, new_key
from inferpipe._stream import StreamChunk, StreamEvent, StreamSession, to_chunk
from inferpipe.wire import ExecutionResult


class ExecutionStream:
    """An execution's text as it is generated: iterate over it, once.

    Dropped connections are mended unseen. The text of a step that is retried comes again: `result`
    has the final word, and `events()` tells of the retry. Leaving early does not cancel the
    execution; leave by `with` or `close`, so that the connection is given back at once.
    """

    def __init__(
        self,
        call: Call,
        runner: Runner,
        execution_id: str | None = None,
        after: int | None = None,
    ) -> None:
        self._session = StreamSession(with_key(call, new_key()), runner.policy, execution_id, after)
        self._runner = runner.for_stream()

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

    def wait(self) -> ExecutionResult:
        """Follow to the end and return the result of an execution that completed.

        Raises:
            ExecutionFailedError: it ended otherwise.
        """
        for _ in self.events():
            pass
        return self.result

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


class AsyncExecutionStream:
    """`ExecutionStream` for asyncio."""

    def __init__(
        self,
        call: Call,
        runner: AsyncRunner,
        execution_id: str | None = None,
        after: int | None = None,
    ) -> None:
        self._session = StreamSession(with_key(call, new_key()), runner.policy, execution_id, after)
        self._runner = runner.for_stream()

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

    async def wait(self) -> ExecutionResult:
        """Follow to the end and return the result of an execution that completed.

        Raises:
            ExecutionFailedError: it ended otherwise.
        """
        async for _ in self.events():
            pass
        return self.result

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

"""The executions of the fake server: how a scripted outcome becomes a journal and its views.

Owns the events of one execution and what is told of it, in the shapes of the real service. Reads
no clock: event n happens n milliseconds after a fixed moment. Invariant: a journal only grows, so a
cursor of one reading is good for the next.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from inferpipe._sse import encode_sse
from inferpipe.wire import TERMINAL_STATUSES, ExecuteRequest, UsageView

STEP = "step"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One start of a workflow. `mode` is `sync`, `async` or `stream`."""

    mode: str
    request: ExecuteRequest
    idempotency_key: str
    headers: Mapping[str, str] = field(repr=False)

    @property
    def workflow_id(self) -> str:
        """Which workflow."""
        return self.request.workflow_id

    @property
    def input(self) -> dict[str, Any]:
        """With what."""
        return self.request.input


class FakeExecution:
    """One execution: its events, and what they come to."""

    def __init__(
        self, execution_id: str, number: int, wish: ExecuteRequest, retry_of: str | None
    ) -> None:
        self.id = execution_id
        self.wish = wish
        self.status = "running"
        self.events: list[bytes] = []
        self._at = EPOCH + timedelta(seconds=number)
        self._retry_of = retry_of
        self._ending: dict[str, Any] = {}
        self._usage = UsageView()
        self._awaited: str | None = None
        self._append("execution.started", {"workflowId": wish.workflow_id})
        self._append("step.started", {"step": STEP, "attempt": 1})

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended."""
        return self.status in TERMINAL_STATUSES

    def chunk(self, text: str) -> None:
        """Stream some text."""
        self._append("chunk", {"data": text, "step": STEP})

    def await_signal(self, name: str) -> None:
        """Wait for the signal, which completes it with its data."""
        self.status = "waiting"
        self._awaited = name

    def signal(self, name: str, data: Any) -> httpx.Response:
        """Take a signal; one that nothing waits for is kept, as by the service, to no effect."""
        if self.is_terminal:
            return problem(409, "ALREADY_TERMINAL", f"it is {self.status}")
        if name == self._awaited:
            self.end("completed", data=data)
        return httpx.Response(202, json={"id": self.id, "status": self.status})

    def end(self, status: str, *, usage: UsageView | None = None, **ending: Any) -> None:
        """End it; `ending` is `data`, or `error` and `error_code`."""
        self._usage = usage or UsageView()
        if status == "completed":
            self._append(
                "step.completed",
                {"step": STEP, "output": ending.get("data"), "usage": self._usage_view()},
            )
        self.status, self._ending = status, ending
        self._append(f"execution.{status}", self.result())

    def cancel(self) -> httpx.Response:
        """Cancel it, if it has not ended."""
        if self.is_terminal:
            return problem(409, "ALREADY_TERMINAL", f"it is {self.status}")
        self.end("cancelled", error="cancelled by the caller", error_code="CANCELLED")
        return httpx.Response(202, json={"id": self.id, "status": "cancelling"})

    def result(self) -> dict[str, Any]:
        """`ExecutionResult`."""
        return {
            "id": self.id,
            "status": self.status,
            "data": self._ending.get("data"),
            "error": self._ending.get("error"),
            "errorCode": self._ending.get("error_code"),
            "metadata": self.wish.metadata,
            "usage": self._usage_view(),
            "timing": {"queuedMs": 0, "runMs": len(self.events), "totalMs": len(self.events)},
            "attempts": 1,
            "workflowId": self.wish.workflow_id,
            "workflowVersion": 1,
            "cached": False,
        }

    def record(self) -> dict[str, Any]:
        """`ExecutionRecord`."""
        is_done = self.status == "completed"
        ended_at = self._moment(len(self.events)) if self.is_terminal else None
        step = {
            "id": STEP,
            "type": "echo",
            "status": self.status,
            "attempts": 1,
            "startedAt": self._moment(1),
            "completedAt": ended_at,
            "output": self._ending.get("data"),
            "error": self._ending.get("error"),
            "usage": self._usage_view(),
            "waiting": {"event": self._awaited} if self.status == "waiting" else None,
        }
        return {
            **self.result(),
            "progress": 100 if is_done else 0,
            "retryOf": self._retry_of,
            "userId": self.wish.user_id,
            "createdAt": self._moment(0),
            "startedAt": self._moment(1),
            "completedAt": ended_at,
            "steps": [step],
        }

    def stream(self, after: int, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Its events from a cursor on, also those that are appended while they are read."""
        if self.is_terminal and after == len(self.events):
            return httpx.Response(204)
        shown = {"content-type": "text/event-stream", "x-execution-id": self.id, **(headers or {})}
        return httpx.Response(200, headers=shown, stream=_Body(self, after))

    def _append(self, event: str, data: Mapping[str, Any]) -> None:
        seq = len(self.events) + 1
        shown = {**data, "executionId": self.id, "timestamp": self._moment(seq)}
        self.events.append(encode_sse(event, json.dumps(shown).encode(), seq))

    def _usage_view(self) -> dict[str, int]:
        return self._usage.model_dump()

    def _moment(self, seq: int) -> str:
        moment = self._at + timedelta(milliseconds=seq)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, execution: FakeExecution, after: int) -> None:
        self._execution = execution
        self._after = after

    def __iter__(self) -> Iterator[bytes]:
        execution = self._execution
        while True:
            if self._after < len(execution.events):
                self._after += 1
                yield execution.events[self._after - 1]
            elif execution.is_terminal:
                return
            else:
                raise AssertionError(
                    f"the stream of {execution.id}, which is held, was read to where it waits:"
                    " finish, fail or cancel it first"
                )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in self:
            yield event


@dataclass(frozen=True, slots=True)
class Answer:
    """It ends: with what `function` makes of the input, or failed where there is an `error`."""

    function: Callable[[dict[str, Any]], Any] | None
    chunks: tuple[str, ...] = ()
    usage: UsageView = field(default_factory=UsageView)
    error: str | None = None
    error_code: str | None = None

    def play(self, execution: FakeExecution) -> None:
        """Stream, then end."""
        for text in self.chunks:
            execution.chunk(text)
        if self.function is None:
            execution.end("failed", error=self.error, error_code=self.error_code)
        else:
            data = self.function(execution.wish.input)
            execution.end("completed", data=data, usage=self.usage)


@dataclass(frozen=True, slots=True)
class Hold:
    """It runs until the test says otherwise."""

    chunks: tuple[str, ...]

    def play(self, execution: FakeExecution) -> None:
        """Stream."""
        for text in self.chunks:
            execution.chunk(text)


@dataclass(frozen=True, slots=True)
class Await:
    """It waits for a signal."""

    signal: str

    def play(self, execution: FakeExecution) -> None:
        """Wait."""
        execution.await_signal(self.signal)


@dataclass(frozen=True, slots=True)
class Refuse:
    """It is not accepted."""

    status: int
    code: str
    detail: str
    headers: Mapping[str, str]

    def respond(self) -> httpx.Response:
        """Say so."""
        return problem(self.status, self.code, self.detail, self.headers)


@dataclass(frozen=True, slots=True)
class Lose:
    """The connection breaks."""

    def respond(self) -> httpx.Response:
        """Break it."""
        raise httpx.RemoteProtocolError("scripted: the connection was lost")


Running = Answer | Hold | Await  # what makes an execution
Outcome = Running | Refuse | Lose


def problem(
    status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """An error body as RFC 9457 has it."""
    body = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code}
    return httpx.Response(
        status,
        headers={"content-type": "application/problem+json", **(headers or {})},
        content=json.dumps({**body, "requestId": "fake"}),
    )


def body_of(request: httpx.Request) -> dict[str, Any]:
    """The body's members."""
    members: dict[str, Any] = json.loads(request.content)
    return members

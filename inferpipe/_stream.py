"""The conversations with a server, without the I/O: retries, and streams that mend themselves.

Owns when to send again, how long to wait, and a stream's cursor. Each conversation is a *script*:
a generator that yields an effect (send this, read on, wait) and is sent the reply, so that the
sync and the async client run the same one. Invariant: an event is handed out only if its id is
above every id handed out before.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias, TypeGuard, TypeVar

from inferpipe._calls import (
    Answer,
    Call,
    as_stream,
    execution_call,
    read_model,
    refusal,
    retry_after_s,
)
from inferpipe._sse import ServerSentEvent, SseDecoder, SseTooLargeError
from inferpipe.errors import (
    ExecutionFailedError,
    InferPipeConnectionError,
    InferPipeError,
    InferPipeProtocolError,
    InferPipeTimeoutError,
)
from inferpipe.wire import TERMINAL_STATUSES, ExecutionRecord, ExecutionResult

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 8.0
RETRY_AFTER_MAX_S = 60.0  # told to wait longer, the caller decides, not the library
RECONNECTS_MAX = 10  # in a row without a new event: about 30 s, six times an ingress restart

RETRYABLE_STATUSES = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
TERMINAL_EVENTS = frozenset(f"execution.{status}" for status in TERMINAL_STATUSES)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event of an execution's stream. `id` is its place in the journal; `gap` may lack it."""

    type: str
    data: dict[str, Any]
    id: int | None = None


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """Text as it is generated; `step` is the id of the step that generates it."""

    data: str
    step: str | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: send the call, read the whole answer. Reply: Answer or Unreachable."""

    call: Call


@dataclass(frozen=True, slots=True)
class Open:
    """Effect: send the call; keep the body of a 200 open for `Read`, read any other whole.

    Reply: Answer or Unreachable. A body that is still open from before is closed first.
    """

    call: Call


@dataclass(frozen=True, slots=True)
class Read:
    """Effect: the open body's next bytes. Reply: bytes, empty at its end, or Unreachable."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Effect: wait. Reply: None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Unreachable:
    """Reply: no answer. `is_timeout`: the connection stood, the server was silent for too long."""

    reason: str
    is_timeout: bool = False


Effect: TypeAlias = Send | Open | Read | Sleep
Reply: TypeAlias = Answer | Unreachable | bytes | None
Script: TypeAlias = Generator[Effect, Reply, T]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to send again. `jitter` draws from [0, 1)."""

    retries: int
    jitter: Callable[[], float]

    def backoff_s(self, attempt: int) -> float:
        """Full jitter over a doubling ceiling (AWS, "Exponential Backoff And Jitter", 2015)."""
        return self.jitter() * min(BACKOFF_MAX_S, math.ldexp(BACKOFF_FIRST_S, attempt - 1))

    def delay_s(self, call: Call, reply: Answer | Unreachable, attempt: int) -> float | None:
        """Return the wait before the next attempt, None for no further one.

        A silent server is not asked again: the caller's patience is what ended.
        """
        if attempt > self.retries or not call.is_repeatable:
            return None
        if isinstance(reply, Unreachable):
            return None if reply.is_timeout else self.backoff_s(attempt)
        if reply.status in call.accepts or reply.status not in RETRYABLE_STATUSES:
            return None
        asked_s = retry_after_s(reply.headers) or 0.0
        return None if asked_s > RETRY_AFTER_MAX_S else asked_s + self.backoff_s(attempt)


def exchange(effect: Send | Open, policy: RetryPolicy) -> Script[Answer]:
    """Send, again where that may help, until there is an answer to return or to raise."""
    attempt = 0
    is_lost = False  # an earlier try may have been heard: only its answer is missing
    while True:
        attempt += 1
        reply = yield effect
        assert isinstance(reply, Answer | Unreachable)
        if is_lost and _is_done_before(reply, effect.call):
            return reply
        is_lost = is_lost or isinstance(reply, Unreachable)
        delay_s = policy.delay_s(effect.call, reply, attempt)
        if delay_s is None:
            return _settle(effect.call, reply)
        yield Sleep(delay_s)


def completed(result: ExecutionResult) -> ExecutionResult:
    """Return the result of an execution that completed.

    Raises:
        ExecutionFailedError: it ended otherwise.
    """
    if result.status != "completed":
        raise ExecutionFailedError(result)
    return result


class StreamSession:
    """One execution's events, over as many connections as it takes.

    It ends with the terminal event. A connection that ends earlier, cleanly or not, is replaced:
    `GET /v1/executions/{id}/stream` with `Last-Event-ID`, at most RECONNECTS_MAX times between
    two new events.
    """

    def __init__(
        self,
        call: Call,
        policy: RetryPolicy,
        execution_id: str | None = None,
        after: int | None = None,
    ) -> None:
        self.execution_id = execution_id
        self._call = as_stream(call, after)
        self._policy = policy
        self._decoder: SseDecoder | None = None
        self._cursor = after
        self._drops = 0
        self._pending: deque[StreamEvent] = deque()
        self._result: ExecutionResult | None = None

    @property
    def result(self) -> ExecutionResult:
        """The outcome, once the terminal event has come."""
        if self._result is None:
            raise InferPipeError("the stream has not ended: iterate over it to its end first")
        return self._result

    def open(self) -> Script[None]:
        """Start the execution, or join one that runs, unless that is done already."""
        if self._decoder is None:
            answer = yield from exchange(Open(self._call), self._policy)
            if answer.status == HTTPStatus.NO_CONTENT and self.execution_id is not None:
                self._decoder = SseDecoder()  # it has ended before the cursor: nothing to read
                yield from self._fetch_result()
            else:
                self._attach(answer)

    def next_event(self) -> Script[StreamEvent | None]:
        """Return the next event; None once, and only if, the execution completed.

        Raises:
            ExecutionFailedError: in place of None where the execution ended otherwise.
        """
        yield from self.open()
        while not self._pending:
            if self._result is not None:
                completed(self._result)
                return None
            yield from self._fill()
        return self._pending.popleft()

    def _attach(self, answer: Answer) -> None:
        content_type = answer.headers.get("content-type", "")
        if answer.status != HTTPStatus.OK or not content_type.startswith("text/event-stream"):
            raise InferPipeProtocolError(
                f"status {answer.status} with content type {content_type!r} where an event stream"
                " was asked for: is base_url an inferpipe server?"
            )
        self._decoder = SseDecoder()
        self.execution_id = answer.headers.get("x-execution-id", self.execution_id)

    def _fill(self) -> Script[None]:
        assert self._decoder is not None
        reply = yield Read()
        if isinstance(reply, bytes) and reply:
            try:
                arrived = self._decoder.feed(reply)
            except SseTooLargeError as error:
                raise InferPipeProtocolError(str(error)) from error
            for frame in arrived:
                self._accept(frame)
        elif self._result is None:
            lost = reply.reason if isinstance(reply, Unreachable) else "the stream was cut short"
            yield from self._reconnect(lost)

    def _accept(self, frame: ServerSentEvent) -> None:
        event = _read_event(frame)
        if event.id is not None:
            if self._cursor is not None and event.id <= self._cursor:
                return
            self._cursor = event.id
            self._drops = 0
        if self.execution_id is None and isinstance(event.data.get("executionId"), str):
            self.execution_id = event.data["executionId"]
        if event.type in TERMINAL_EVENTS:
            content = frame.data.encode()
            self._result = read_model(Answer(HTTPStatus.OK, {}, content), ExecutionResult)
        self._pending.append(event)

    def _reconnect(self, reason: str) -> Script[None]:
        while True:
            self._drops += 1
            if self._drops > RECONNECTS_MAX:
                raise InferPipeConnectionError(
                    f"the stream of execution {self.execution_id} was lost, and {RECONNECTS_MAX}"
                    f" reconnects brought nothing new; the last one failed with: {reason}"
                )
            yield Sleep(self._policy.backoff_s(self._drops))
            call = self._resume_call()
            reply = yield Open(call)
            assert isinstance(reply, Answer | Unreachable)
            if isinstance(reply, Answer) and reply.status == HTTPStatus.NO_CONTENT:
                yield from self._fetch_result()
                return
            if isinstance(reply, Unreachable):
                reason = reply.reason
            elif _is_passing(reply.status):
                reason = str(refusal(reply))
                yield Sleep(min(RETRY_AFTER_MAX_S, retry_after_s(reply.headers) or 0.0))
            else:
                self._attach(_settle(call, reply))
                return

    def _resume_call(self) -> Call:
        # Without an id, the same key opens the same execution's stream; the cursor drops repeats.
        if self.execution_id is None:
            return self._call
        return as_stream(execution_call(self.execution_id, "/stream"), self._cursor)

    def _fetch_result(self) -> Script[None]:
        assert self.execution_id is not None
        call = execution_call(self.execution_id)
        answer = yield from exchange(Send(call), self._policy)
        record = read_model(answer, ExecutionRecord)
        if record.status not in TERMINAL_STATUSES:
            raise InferPipeProtocolError(
                f"the stream of execution {record.id} has ended (204), yet it is {record.status}"
            )
        self._result = record
        data = {"executionId": record.id, **record.model_dump(mode="json")}
        self._pending.append(StreamEvent(f"execution.{record.status}", data))


def to_chunk(event: StreamEvent) -> StreamChunk | None:
    """Return a `chunk` event's text, None for other events."""
    if event.type != "chunk":
        return None
    text, step = event.data.get("data"), event.data.get("step")
    if not isinstance(text, str):
        raise InferPipeProtocolError(f"event {event.id}: a chunk without text")
    return StreamChunk(text, step)


def _is_done_before(reply: Answer | Unreachable, call: Call) -> TypeGuard[Answer]:
    # An answer to the first try was lost, and what it deleted is gone.
    return (
        call.method == "DELETE"
        and isinstance(reply, Answer)
        and reply.status == HTTPStatus.NOT_FOUND
    )


def _is_passing(status: int) -> bool:
    # While an ingress restarts, proxies answer 502 or 504 as well; a GET may simply try again.
    return status in RETRYABLE_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _read_event(frame: ServerSentEvent) -> StreamEvent:
    try:
        event_id = None if frame.id is None else int(frame.id)
        data = json.loads(frame.data)
    except (ValueError, RecursionError) as error:
        raise InferPipeProtocolError(
            f"event {frame.id}: id or data is not what an inferpipe server sends"
        ) from error
    if not isinstance(data, dict):
        raise InferPipeProtocolError(f"event {frame.id}: data is not an object")
    return StreamEvent(frame.event, data, event_id)


def _settle(call: Call, reply: Answer | Unreachable) -> Answer:
    if isinstance(reply, Unreachable):
        if reply.is_timeout:
            raise InferPipeTimeoutError(f"{call.method} {call.path}: {reply.reason}")
        raise InferPipeConnectionError(f"{call.method} {call.path}: {reply.reason}")
    if not reply.is_success and reply.status not in call.accepts:
        raise refusal(reply)
    return reply

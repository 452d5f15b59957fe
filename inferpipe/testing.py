"""A server for your unit tests: in memory, scripted, behind the real client.

Owns `FakeServer`: what it is told to answer, and what it was asked. The clients it hands out are
`InferPipe` and `AsyncInferPipe` themselves over a transport that ends here, so types, errors,
retries and streams are the real ones; that the answers are too is checked by one suite that runs
against this and against a running service. Invariant: nothing leaves the process, nothing waits,
and what was not scripted is refused in words.

    fake = FakeServer()
    fake.completes("sentiment-analysis", {"sentiment": "positive", "confidence": 0.95})
    with fake.client() as client:
        assert client.execute("sentiment-analysis", {"text": "hi"}).data["sentiment"] == "positive"
    assert fake.calls[0].input == {"text": "hi"}
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx

from inferpipe._fake_executions import (
    Answer,
    Await,
    FakeExecution,
    Hold,
    Lose,
    Outcome,
    RecordedCall,
    Refuse,
    Running,
    body_of,
    problem,
)
from inferpipe.client import AsyncInferPipe, InferPipe
from inferpipe.wire import ExecuteRequest, UsageView

__all__ = ["FakeServer", "RecordedCall"]

VERSION = "fake"
_START = re.compile(r"/v1/execute(?:/(async|stream))?")
_EXECUTION = re.compile(r"/v1/executions/([^/]+)(?:/(stream|cancel|retry|signal))?")


class FakeServer:
    """Answers as it is told; remembers what it was asked. Threads may share it.

    Each of `completes`, `answers`, `fails`, `holds`, `awaits`, `refuses` and `loses` scripts one
    answer of a workflow. Several scripts of one workflow are used in turn, the last one for ever.
    """

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self.signals: list[tuple[str, str, Any]] = []  # execution, name, data
        self._scripts: dict[str, list[Outcome]] = {}
        self._others: dict[str, list[httpx.Response]] = {}
        self._executions: dict[str, FakeExecution] = {}
        self._by_key: dict[tuple[str, str], tuple[object, FakeExecution]] = {}
        self._lock = threading.RLock()

    def client(self, **options: Any) -> InferPipe:
        """Return a client of this server; `options` are those of `InferPipe`."""
        return InferPipe(**{**self._instant(), "sleep": lambda _: None, **options})

    def async_client(self, **options: Any) -> AsyncInferPipe:
        """Return an async client of this server."""
        return AsyncInferPipe(**{**self._instant(), "sleep": _no_sleep, **options})

    def completes(
        self,
        workflow_id: str,
        data: Any = None,
        *,
        chunks: Sequence[str] = (),
        usage: UsageView | None = None,
    ) -> None:
        """Let the workflow complete with `data`, after streaming `chunks`.

        Without `data`, it is the text of the chunks.
        """
        given = "".join(chunks) if data is None and chunks else data
        self._add(workflow_id, Answer(lambda _: given, tuple(chunks), usage or UsageView()))

    def answers(self, workflow_id: str, function: Callable[[dict[str, Any]], Any]) -> None:
        """Let the workflow complete with what the function makes of its input."""
        self._add(workflow_id, Answer(function))

    def fails(
        self,
        workflow_id: str,
        error: str,
        *,
        error_code: str = "STEP_FAILED",
        chunks: Sequence[str] = (),
    ) -> None:
        """Let the workflow fail, after streaming `chunks`."""
        self._add(workflow_id, Answer(None, tuple(chunks), error=error, error_code=error_code))

    def holds(self, workflow_id: str, *, chunks: Sequence[str] = ()) -> None:
        """Let the workflow run until it is cancelled, or `finish` or `fail` is called.

        Reading its stream beyond the chunks before that is an AssertionError: it would never end.
        """
        self._add(workflow_id, Hold(tuple(chunks)))

    def awaits(self, workflow_id: str, signal: str) -> None:
        """Let the workflow wait for a signal, and complete with its data."""
        self._add(workflow_id, Await(signal))

    def refuses(
        self,
        workflow_id: str,
        status: int,
        code: str,
        detail: str = "scripted",
        *,
        retry_after_s: int | None = None,
    ) -> None:
        """Let the server refuse to start the workflow."""
        headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
        self._add(workflow_id, Refuse(status, code, detail, headers))

    def loses(self, workflow_id: str) -> None:
        """Let the connection break before the answer; the client tries again where it may."""
        self._add(workflow_id, Lose())

    def finish(self, execution_id: str, data: Any = None) -> None:
        """Complete an execution that is held."""
        self._held(execution_id).end("completed", data=data)

    def fail(self, execution_id: str, error: str, *, error_code: str = "STEP_FAILED") -> None:
        """Fail an execution that is held."""
        self._held(execution_id).end("failed", error=error, error_code=error_code)

    def script(self, call: str, body: object, *, status: int = 200) -> None:
        """Script any other call, such as `GET /v1/usage`: in turn, the last answer for ever."""
        self._others.setdefault(call, []).append(httpx.Response(status, json=body))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request: what `httpx.MockTransport` asks for."""
        with self._lock:
            return self._route(request)

    def _instant(self) -> dict[str, Any]:
        return {"transport": httpx.MockTransport(self), "base_url": "http://fake.test"}

    def _add(self, workflow_id: str, outcome: Outcome) -> None:
        self._scripts.setdefault(workflow_id, []).append(outcome)

    def _held(self, execution_id: str) -> FakeExecution:
        execution = self._executions[execution_id]
        if execution.is_terminal:
            raise AssertionError(f"execution {execution_id} has ended already")
        return execution

    def _route(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        answer: httpx.Response | None = _next(self._others.get(f"{request.method} {path}"))
        if answer is not None:
            # A response is used up by one client; a script is used again.
            return httpx.Response(answer.status_code, content=bytes(answer.content))
        if request.method == "POST" and (start := _START.fullmatch(path)):
            return self._start(request, start[1] or "sync")
        if found := _EXECUTION.fullmatch(path):
            return self._execution(request, found[1], found[2])
        if (request.method, path) == ("GET", "/v1/executions"):
            return self._list(request.url.params)
        if (request.method, path) == ("GET", "/v1/health"):
            return httpx.Response(
                200, json={"status": "healthy", "version": VERSION, "services": {}}
            )
        raise AssertionError(
            f"{request.method} {path} was not scripted: fake.script({f'{request.method} {path}'!r},"
            " ...)"
        )

    def _start(self, request: httpx.Request, mode: str) -> httpx.Response:
        wish = ExecuteRequest.model_validate_json(request.content)
        key = request.headers["idempotency-key"]
        body = json.loads(request.content)
        known = self._by_key.get((request.url.path, key))
        if known is not None and known[0] != body:
            return problem(409, "IDEMPOTENCY_CONFLICT", "this key came with another body")
        execution = None if known is None else known[1]
        if execution is None:
            self.calls.append(RecordedCall(mode, wish, key, dict(request.headers)))
            outcome: Outcome | None = _next(self._scripts.get(wish.workflow_id))
            if outcome is None:
                return problem(404, "UNKNOWN_WORKFLOW", f"no workflow {wish.workflow_id!r}")
            if not isinstance(outcome, Running):
                return outcome.respond()
            execution = self._create(wish, outcome)
            self._by_key[request.url.path, key] = (body, execution)
        return self._started(execution, mode, is_replay=known is not None)

    def _create(
        self, wish: ExecuteRequest, outcome: Running, retry_of: str | None = None
    ) -> FakeExecution:
        number = len(self._executions) + 1
        execution = FakeExecution(f"exe_fake{number}", number, wish, retry_of)
        self._executions[execution.id] = execution
        outcome.play(execution)
        return execution

    def _started(self, execution: FakeExecution, mode: str, *, is_replay: bool) -> httpx.Response:
        headers = {"x-execution-id": execution.id}
        if is_replay:
            headers["idempotency-replayed"] = "true"
        if mode == "async":
            info = {"id": execution.id, "status": "pending"}
            return httpx.Response(202, headers=headers, json=info)
        if mode == "stream":
            return execution.stream(0, headers)
        if not execution.is_terminal:
            raise AssertionError(
                f"execute() waits for {execution.id}, which is held: use execute_async or a stream"
            )
        return httpx.Response(200, headers=headers, json=execution.result())

    def _execution(
        self, request: httpx.Request, execution_id: str, action: str | None
    ) -> httpx.Response:
        execution = self._executions.get(execution_id)
        if execution is None:
            return problem(404, "UNKNOWN_EXECUTION", f"no execution {execution_id!r}")
        match action:
            case "stream":
                return execution.stream(int(request.headers.get("last-event-id", 0)))
            case "cancel":
                return execution.cancel()
            case "retry":
                return self._retry(execution)
            case "signal":
                return self._signal(execution, body_of(request))
            case _:
                return httpx.Response(200, json=execution.record())

    def _signal(self, execution: FakeExecution, body: Mapping[str, Any]) -> httpx.Response:
        self.signals.append((execution.id, body["name"], body["data"]))
        return execution.signal(body["name"], body["data"])

    def _retry(self, execution: FakeExecution) -> httpx.Response:
        if not execution.is_terminal:
            return problem(409, "NOT_TERMINAL", "it has not ended")
        outcome = _next(self._scripts.get(execution.wish.workflow_id))
        assert isinstance(outcome, Running), "script what the retry shall come to"
        again = self._create(execution.wish, outcome, execution.id)
        info = {"id": again.id, "status": "pending", "retryOf": execution.id}
        return httpx.Response(202, json=info)

    def _list(self, query: Mapping[str, str]) -> httpx.Response:
        newest_first = reversed(self._executions.values())
        found = [
            one
            for one in newest_first
            if query.get("workflowId", one.wish.workflow_id) == one.wish.workflow_id
            and query.get("status", one.status) == one.status
        ]
        start, size = int(query.get("cursor", 0)), int(query.get("limit", 50))
        part = found[start : start + size]
        cursor = str(start + size) if len(part) == size else None
        return httpx.Response(200, json={"items": _items(part), "nextCursor": cursor})


def _items(executions: Iterable[FakeExecution]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in one.record().items() if name not in {"data", "steps"}}
        for one in executions
    ]


def _next(script: list[Any] | None) -> Any:
    """The next of a script, whose last one stays; None for no script."""
    if not script:
        return None
    return script.pop(0) if len(script) > 1 else script[0]


async def _no_sleep(_: float) -> None:
    return None

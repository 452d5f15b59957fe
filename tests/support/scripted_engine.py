"""An `InferenceEngine` that says what a script says: deterministic tokens, aborts, deaths, errors.

Every running request advances by one token per step. A step happens once per turn of the loop, or
every `step_s` of the given clock, or, with `is_manual`, when a test calls `step()`.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from serve_app.core.errors import ConnectionFailedError, ServeAppError
from serve_app.core.inference import Chunk, FinishReason, GenerationRequest, ReplicaLoad, Usage
from serve_app.ports import Clock

Emit = Callable[[Chunk | Exception], None]
TOKEN_COUNT = 8  # of an answer whose request sets no max_tokens


def words(request: GenerationRequest) -> list[str]:
    """The default script: `t0 t1 t2 …`, each word a token, as many as the request allows."""
    return [f"t{index} " for index in range(request.max_tokens or TOKEN_COUNT)]


@dataclass
class _Running:
    request: GenerationRequest
    emit: Emit
    tokens: list[str]
    done: int = 0
    prompt_tokens: int = 0


@dataclass
class ScriptedEngine:
    """Args:
    script: the tokens of the answer to a request; more than `max_tokens` are cut off.
    clock, step_s: pace; without a clock one step per loop turn.
    is_manual: no step but by `step()`.
    token_id: the id of the token at an index of the answer.
    errors: what a request ends with after so many tokens, by request id.
    """

    script: Callable[[GenerationRequest], list[str]] = words
    clock: Clock | None = None
    step_s: float = 0.0
    is_manual: bool = False
    errors: Mapping[str, tuple[int, Exception]] = field(default_factory=dict)
    token_id: Callable[[int], int] = int
    models: tuple[str, ...] = ("scripted",)
    context_max: int = 4096
    submitted: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    step_count: int = 0
    is_dead: bool = False
    is_stopped: bool = False
    _running: dict[str, _Running] = field(default_factory=dict)
    _pace: asyncio.Task[None] | None = None
    _is_step_due: bool = False

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the requests that run, in order of arrival."""
        return tuple(self._running)

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        if self.is_dead:
            raise ConnectionFailedError("the engine is dead")
        self.submitted.append(request)
        tokens = self.script(request)[: request.max_tokens]
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        self._running[request.request_id] = _Running(
            request, emit, tokens, done=len(request.resume_ids), prompt_tokens=prompt_tokens
        )
        self._schedule()

    def abort(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self.aborted.append(request_id)
        running.emit(Chunk("", (), FinishReason.CANCELLED, usage_of(running)))

    def load(self) -> ReplicaLoad:
        queued = sum(
            running.prompt_tokens + len(running.tokens) - running.done
            for running in self._running.values()
        )
        return ReplicaLoad(
            replica_id="",
            models=self.models,
            host="",
            port=0,
            queued_tokens=queued,
            running_count=len(self._running),
            step_count=self.step_count,
            context_max=self.context_max,
        )

    async def check_health(self) -> None:
        if self.is_dead:
            raise ConnectionFailedError("the engine is dead")

    async def stop(self) -> None:
        self.is_stopped = True
        if self._pace is not None:
            self._pace.cancel()
            await asyncio.gather(self._pace, return_exceptions=True)
        self._end_all(ConnectionFailedError("the engine was stopped"))

    def die(self) -> None:
        """Fail everything that runs and refuse everything that comes."""
        self.is_dead = True
        self._end_all(ConnectionFailedError("the engine died"))

    def step(self) -> None:
        """Give every running request one token."""
        self.step_count += 1
        for running in tuple(self._running.values()):
            if running.request.request_id in self._running:
                self._advance(running)

    def _advance(self, running: _Running) -> None:
        request_id = running.request.request_id
        count, error = self.errors.get(request_id, (-1, ServeAppError("never")))
        if running.done == count:
            del self._running[request_id]
            running.emit(error)
            return
        text, token_ids = "", ()
        if running.done < len(running.tokens):
            text, token_ids = running.tokens[running.done], (self.token_id(running.done),)
            running.done += 1
        if running.done < len(running.tokens) or running.done == count:
            running.emit(Chunk(text, token_ids))
            return
        del self._running[request_id]
        self.finished.append(request_id)
        is_cut = running.request.max_tokens == running.done
        reason = FinishReason.LENGTH if is_cut else FinishReason.STOP
        running.emit(Chunk(text, token_ids, reason, usage_of(running)))

    def _end_all(self, error: Exception) -> None:
        running, self._running = self._running, {}
        for one in running.values():
            one.emit(error)

    def _schedule(self) -> None:
        if self.is_manual:
            return
        if self.clock is not None:
            if self._pace is None or self._pace.done():
                self._pace = asyncio.create_task(self._run(self.clock))
        elif not self._is_step_due:
            self._is_step_due = True
            asyncio.get_running_loop().call_soon(self._step_once)

    def _step_once(self) -> None:
        self._is_step_due = False
        self.step()
        if self._running:
            self._schedule()

    async def _run(self, clock: Clock) -> None:
        while self._running:
            await clock.sleep(self.step_s)
            self.step()


def usage_of(running: _Running) -> Usage:
    """The usage so far."""
    return Usage(prompt_tokens=running.prompt_tokens, completion_tokens=running.done)


def joined(chunks: Iterable[Chunk]) -> str:
    """The text of all chunks."""
    return "".join(chunk.text for chunk in chunks)

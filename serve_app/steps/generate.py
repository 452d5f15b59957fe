"""`generate`: a model call as a durable step, its tokens in the journal as they come.

Owns the settings under vLLM's names and the parsing of structured answers. Where the model has
tools, one run is one turn: it records an answer, a call that fits its tool, or what is wrong with
the call (`core.tools`). Invariants: an answer with an `output_schema` is recorded only when it is
whole and parses; the last tokens of an answer are emitted in the commit that has its result, so
that what a lost worker leaves in the journal is the beginning of an answer, to be gone on with.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.core.errors import Problem, StepFailedError
from serve_app.core.inference import (
    MAX_TOKENS_DEFAULT,
    Chunk,
    FinishReason,
    GenerationRequest,
    JsonValue,
    Message,
)
from serve_app.core.template import expressions_in
from serve_app.core.tool_text import grammar_of, is_call, messages_of, read_call
from serve_app.core.tools import CONTENT, PROBLEM, TEXT, TOOL_CALL, Turn
from serve_app.ports import Entropy, Schemas, StepCall, StepType
from serve_app.services.inference import Inference


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: str = Field(pattern="^(system|user|assistant)$")
    content: str


class _Settings(BaseModel):
    """The settings once every expression has its value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | None = Field(default=None, min_length=1)
    messages: list[_Turn] | None = Field(default=None, min_length=1)
    model: str = ""
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=MAX_TOKENS_DEFAULT, ge=1)
    stop: list[str] | str = Field(default_factory=list)
    seed: int | None = None
    output_schema: dict[str, Any] | None = None

    def turns(self) -> tuple[Message, ...]:
        if self.messages is not None:
            return tuple(Message(turn.role, turn.content) for turn in self.messages)
        return (Message("user", self.prompt or ""),)

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def generate_step(inference: Inference, schemas: Schemas, entropy: Entropy) -> StepType:
    """The step type, bound to the model plane."""
    run = _runner(inference, schemas, entropy)
    return StepType(check=_check, run=run, can_resume=lambda _settings: True)


def _runner(
    inference: Inference, schemas: Schemas, entropy: Entropy
) -> Callable[[StepCall], Awaitable[JsonValue]]:
    async def run(call: StepCall) -> JsonValue:
        settings = _parse(call.settings)
        refusal = None if settings.output_schema is None else schemas.check(settings.output_schema)
        if refusal is not None:
            raise StepFailedError(f"output_schema: {refusal}", False)  # noqa: FBT003
        # Unique per run: the run of a lost worker may still be in the engine under the same key.
        request = _request(call, settings, f"{call.idempotency_key}/{entropy.token()}")
        reply = _Reply(call)
        async with aclosing(inference.generate(request, emitted=call.emitted)) as chunks:
            async for chunk in chunks:
                reply.take(chunk)
        output = _output(reply, call.turn, settings, schemas)
        reply.end()
        return output

    return run


class _Reply:
    """What the model says, passed on as it comes, unless it is a call: that is nobody's text."""

    def __init__(self, call: StepCall) -> None:
        self.text = call.emitted.text
        self.finish_reason: FinishReason | None = None
        self._call = call
        self._is_call: bool | None = False  # None: not to be told yet
        # What a lost run has emitted is an answer's.
        if call.turn is not None and call.turn.callable and not call.emitted.token_ids:
            self._is_call = True if call.turn.must_call else None
        self._held_ids: tuple[int, ...] = ()
        self._last: tuple[str, tuple[int, ...]] = "", ()

    def take(self, chunk: Chunk) -> None:
        self.finish_reason = chunk.finish_reason
        if chunk.usage is not None:
            self._call.report_usage(chunk.usage)
        if chunk.resumed is not None:
            self._call.report_resumed(chunk.resumed)
        text, ids = chunk.text, chunk.token_ids
        self.text += text
        if self._is_call is None:
            self._is_call = is_call(self.text)
            text, ids = self.text, self._held_ids + ids
            self._held_ids = ids
        if chunk.finish_reason is not None and not self._is_call:
            self._last = text, ids
        elif self._is_call is False:
            self._call.emit(text, ids)

    def end(self) -> None:
        """Pass the last piece on; nothing may be awaited between this and the step's return."""
        self._call.emit(*self._last)


def _output(reply: _Reply, turn: Turn | None, settings: _Settings, schemas: Schemas) -> JsonValue:
    if turn is None:
        return _answer(reply.text, reply.finish_reason, settings, schemas)
    if turn.callable and (turn.must_call or is_call(reply.text)):
        return _called(reply.text, turn, settings, reply.finish_reason, schemas)
    return {CONTENT: _answer(reply.text, reply.finish_reason, settings, schemas)}


def _called(
    text: str,
    turn: Turn,
    settings: _Settings,
    finish_reason: FinishReason | None,
    schemas: Schemas,
) -> JsonValue:
    """A call that can be made, or why not: the model is told, and the round is over."""
    try:
        made = read_call(text, turn)
    except ValueError as error:
        is_cut = finish_reason is FinishReason.LENGTH
        cut = f"; it was cut off at max_tokens={settings.max_tokens}" if is_cut else ""
        return {TEXT: text, PROBLEM: f"{error}{cut}"}
    parameters = next(tool.parameters for tool in turn.tools if tool.name == made.name)
    problems = schemas.problems(parameters, made.arguments)
    if problems:
        place = ".".join(str(part) for part in ("arguments", *problems[0].loc))
        return {TEXT: text, PROBLEM: f"{place}: {problems[0].msg}"}
    return {TEXT: text, TOOL_CALL: {"name": made.name, "arguments": dict(made.arguments)}}


def _request(call: StepCall, settings: _Settings, request_id: str) -> GenerationRequest:
    turn, messages = call.turn, settings.turns()
    grammar = None if turn is None else grammar_of(turn, settings.output_schema)
    return GenerationRequest(
        request_id=request_id,
        messages=messages if turn is None else messages_of(turn, messages),
        model=settings.model,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop=settings.stops(),
        seed=settings.seed,
        output_schema=settings.output_schema if grammar is None else None,
        engine_options={} if grammar is None else {"structured_outputs": {"grammar": grammar}},
        deadline_ms=call.deadline_ms,
        priority=-call.priority,  # vLLM runs the lower number first
        tenant=call.workspace,
    )


def _answer(
    text: str, finish_reason: FinishReason | None, settings: _Settings, schemas: Schemas
) -> JsonValue:
    if settings.output_schema is None:
        return text
    if finish_reason is FinishReason.LENGTH:
        raise StepFailedError(
            f"the answer reached max_tokens={settings.max_tokens} before its JSON ended; "
            "raise max_tokens or bound the strings and lists of output_schema"
        )
    try:
        parsed: JsonValue = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise StepFailedError(f"the answer is no JSON: {error}") from error
    # A grammar does not enforce every keyword of JSON Schema; what is recorded satisfies all.
    problems = schemas.problems(settings.output_schema, parsed)
    if problems:
        place = ".".join(str(part) for part in problems[0].loc)
        raise StepFailedError(
            f"the answer breaks output_schema at {place or 'its root'}: {problems[0].msg}"
        )
    return parsed


def _parse(settings: JsonValue) -> _Settings:
    try:
        parsed = _Settings.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StepFailedError(f"generate.{place}: {first['msg']}", False) from error  # noqa: FBT003
    if (parsed.prompt is None) == (parsed.messages is None):
        raise StepFailedError("generate needs either prompt or messages", False)  # noqa: FBT003
    return parsed


def _check(settings: JsonValue) -> Sequence[Problem]:
    """Check what is known before any input: keys, and values that hold no expression."""
    if not isinstance(settings, Mapping):
        return (Problem((), "generate takes an object: prompt or messages, and settings"),)
    problems = [
        Problem((key,), f"unknown setting; known: {', '.join(sorted(_Settings.model_fields))}")
        for key in settings
        if key not in _Settings.model_fields
    ]
    if ("prompt" in settings) == ("messages" in settings):
        problems.append(Problem((), "generate needs either prompt or messages"))
    literal = {
        key: value
        for key, value in settings.items()
        if key in _Settings.model_fields and not expressions_in(value)
    }
    try:
        _Settings.model_validate(literal)
    except ValidationError as error:
        problems.extend(
            Problem(detail["loc"], detail["msg"]) for detail in error.errors(include_url=False)
        )
    return problems

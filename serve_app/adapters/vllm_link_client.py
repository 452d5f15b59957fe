"""What vLLM's serving classes ask of an engine, answered over our links.

Owns the way from vLLM's prompt and `SamplingParams` to `GenerationRequest`s, and from chunks to
`RequestOutput`s. Validates nothing (the serving classes and the replica's engine do). It has the
members of `vllm.engine.protocol.EngineClient` that vLLM 0.32 uses for chat, completions and
responses, and no other: pausing, profiling or weights are no caller's business here. Invariant:
leaving the iterator early aborts every generation it began.

Imports vLLM: 6 s and 0.5 GB, so `vllm_openai_lazy` imports this in a thread.
"""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm import PoolingParams, SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import GenerationError
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, PoolingOutput, PoolingRequestOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.input_processor import InputProcessor

from serve_app.adapters.vllm_sampling import SamplingOptions
from serve_app.core.errors import ConnectionFailedError, InvalidPromptError, ServeAppError
from serve_app.core.inference import (
    EMBEDDING,
    NO_USAGE,
    Chunk,
    FinishReason,
    GenerationRequest,
    JsonValue,
    Resumed,
    TokenScore,
    Usage,
)
from serve_app.ports import Entropy, Generate, OpenAiCall

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
}


@dataclass(slots=True)
class CallState:
    """What one HTTP call and its generations tell each other, past vLLM's code.

    Args:
        call: the HTTP call.
        is_plain: its answer is one stream of text; see `vllm_openai_plain`.
        has_begun: the first chunk is there.
        error: what a generation ended with; vLLM makes an error event of it, we know better.
        usage: of each generation so far, by its id.
        resumed: set once a generation went on at another replica.
    """

    call: OpenAiCall
    is_plain: bool = False
    has_begun: bool = False
    error: ServeAppError | None = None
    usage: dict[str, Usage] = field(default_factory=dict)
    resumed: Resumed | None = None

    def total(self) -> Usage:
        """The bill: each generation computed its prompt, or found it in the cache."""
        return sum(self.usage.values(), NO_USAGE)


CALL: ContextVar[CallState] = ContextVar("CALL")


class LinkEngineClient:
    """An engine to vLLM's serving classes; a client of our replicas in truth.

    Args:
        config: of the model; no engine runs in this process.
        model: the id that replicas know it by.
        generate: `Inference.generate`.
    """

    def __init__(
        self, config: VllmConfig, model: str, generate: Generate, entropy: Entropy
    ) -> None:
        self.vllm_config = config
        self.model_config = config.model_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.errored = False  # which replica lives is the router's knowledge
        self._model = model
        self._generate = generate
        self._entropy = entropy
        self._options = SamplingOptions(SamplingParams())

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Admit: the router decides when the generation begins."""

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **given: Any
    ) -> AsyncGenerator[RequestOutput | Chunk, None]:
        """Yield outputs as `AsyncLLM.generate` does: deltas, or one when all is there.

        Of a plain call the chunks between the first and the last output come as they are; the last
        output counts their tokens.

        Raises:
            GenerationError: the error itself is left in the call's state.
        """
        state = CALL.get()
        outputs = _Outputs(request_id, prompt, sampling_params)
        between: list[int] = []
        has_head = False
        try:
            requests = self._requests(prompt, sampling_params, given, state.call)
            async with aclosing(self._chunks(requests, state)) as chunks:
                async for index, chunk in chunks:
                    if has_head and state.is_plain and chunk.finish_reason is None:
                        between += chunk.token_ids
                        if chunk.text:
                            yield chunk
                        continue
                    if between:
                        chunk = replace(chunk, token_ids=(*between, *chunk.token_ids))  # noqa: PLW2901 - the same chunk, grown
                    output = outputs.add(index, chunk)
                    if output is not None:
                        has_head = True
                        yield output
        except ServeAppError as error:
            state.error = error
            # vLLM makes a stream's last event of it, and does not log it as its own failure.
            raise GenerationError(str(error)) from error

    async def encode(
        self, prompt: Any, pooling_params: PoolingParams, request_id: str, **given: Any
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput], None]:
        """Yield the embedding of one prompt. Raises as `generate`."""
        state = CALL.get()
        options = {
            name: value
            for name in ("dimensions", "use_activation")
            if (value := getattr(pooling_params, name)) is not None
        }
        request = replace(
            self._request(prompt, given, state.call),
            max_tokens=1,
            engine_options={EMBEDDING: options},
        )
        try:
            async with aclosing(self._chunks([request], state)) as chunks:
                *_, chunk = [Chunk(""), *[chunk async for _, chunk in chunks]]
            if chunk.details is None or not chunk.details.embedding:
                raise ConnectionFailedError("the engine gave no embedding")
        except ServeAppError as error:
            state.error = error
            raise GenerationError(str(error)) from error
        data = torch.frombuffer(bytearray(chunk.details.embedding), dtype=torch.float32)
        token_ids = list(request.prompt_token_ids)
        cached = 0 if chunk.usage is None else chunk.usage.cached_tokens
        yield PoolingRequestOutput(
            request_id, PoolingOutput(data=data), token_ids, cached, finished=True
        )

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Nothing to do: whoever stops iterating has aborted."""

    async def _chunks(
        self, requests: list[GenerationRequest], state: CallState
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        async with aclosing(merge_async_iterators(*map(self._generate, requests))) as merged:
            async for index, chunk in merged:
                if chunk.usage is not None:
                    state.usage[requests[index].request_id] = chunk.usage
                state.resumed = chunk.resumed or state.resumed
                if not state.has_begun:
                    state.has_begun = True
                    state.call.on_begin()
                yield index, chunk

    def _requests(
        self,
        prompt: Any,
        params: SamplingParams,
        given: dict[str, Any],
        call: OpenAiCall,
    ) -> list[GenerationRequest]:
        """One for each of the `n` answers, seeded as vLLM seeds them."""
        options: dict[str, JsonValue] = self._options.of(params)
        for name in ("reasoning_ended", "reasoning_parser_kwargs"):
            if given.get(name) is not None:
                options[name] = given[name]
        if prompt.get("cache_salt") is not None:
            options["cache_salt"] = prompt["cache_salt"]
        first = replace(
            self._request(prompt, given, call),
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            stop=tuple(params.stop or ()),
            seed=params.seed,
            engine_options=options,
        )
        others = [
            replace(
                first,
                request_id=f"{first.request_id}-{index}",
                seed=None if params.seed is None else params.seed + index,
            )
            for index in range(1, params.n)
        ]
        return [first, *others]

    def _request(self, prompt: Any, given: dict[str, Any], call: OpenAiCall) -> GenerationRequest:
        """What a prompt and its call say, before any parameters."""
        if prompt.get("type") != "token":
            raise InvalidPromptError("this model takes text alone")
        return GenerationRequest(
            # Not the caller's id: two calls may carry the same one.
            request_id=self._entropy.token(),
            messages=(),
            model=self._model,
            deadline_ms=call.deadline_ms,
            priority=given.get("priority", 0),
            prompt_token_ids=tuple(prompt["prompt_token_ids"]),
            tenant=call.tenant,
            session=given.get("session_id") or call.session,
        )


class _Outputs:
    """Makes one request's outputs: each delta, or all answers at once when the last has ended."""

    def __init__(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        self._request_id = request_id
        self._prompt = prompt
        self._is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self._has_logprobs = params.num_logprobs is not None
        self._parts: list[list[Chunk]] = [[] for _ in range(params.n)]
        self._open_count = params.n

    def add(self, index: int, chunk: Chunk) -> RequestOutput | None:
        """What vLLM is to be told of this chunk."""
        self._open_count -= chunk.finish_reason is not None
        if not self._is_final_only:
            return self._output([self._completion(index, (chunk,))], (chunk,))
        self._parts[index].append(chunk)
        if self._open_count:
            return None
        completions = [self._completion(at, parts) for at, parts in enumerate(self._parts)]
        return self._output(completions, self._parts[0])

    def _completion(self, index: int, chunks: Iterable[Chunk]) -> CompletionOutput:
        chunks = tuple(chunks)
        details = [chunk.details for chunk in chunks if chunk.details is not None]
        logprobs: Any = [_scores(at) for one in details for at in one.logprobs]
        last = chunks[-1]
        return CompletionOutput(
            index=index,
            text="".join([chunk.text for chunk in chunks]),
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
            cumulative_logprob=None,
            logprobs=logprobs if self._has_logprobs else None,
            finish_reason=None if last.finish_reason is None else _REASONS[last.finish_reason],
            stop_reason=details[-1].stop_reason if details else None,
        )

    def _output(
        self, completions: list[CompletionOutput], chunks: Iterable[Chunk]
    ) -> RequestOutput:
        chunks = tuple(chunks)
        usage = chunks[-1].usage
        of_prompt = [
            _scores(at) or None
            for chunk in chunks
            if chunk.details is not None
            for at in chunk.details.prompt_logprobs
        ]
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt.get("prompt"),
            prompt_token_ids=self._prompt["prompt_token_ids"],
            prompt_logprobs=of_prompt or None,
            outputs=completions,
            finished=not self._open_count,
            num_cached_tokens=None if usage is None else usage.cached_tokens,
        )


def _scores(scores: Iterable[TokenScore]) -> dict[int, Logprob]:
    return {id_: Logprob(logprob, rank, text) for id_, logprob, rank, text in scores}

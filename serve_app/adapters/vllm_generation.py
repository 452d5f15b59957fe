"""One generation inside a vLLM engine: the collector of its outputs, and its one ending.

Owns what is known of one request while it runs. Starts and aborts nothing (the engine adapter
does). Invariant: after the last `emit`, a chunk with `finish_reason` or an error, no other follows.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from serve_app.adapters.vllm_prompt import chars_of
from serve_app.core.errors import ConnectionFailedError, InvalidPromptError, ServeAppError
from serve_app.core.inference import (
    Chunk,
    ChunkDetails,
    FinishReason,
    GenerationRequest,
    TokenScore,
    Usage,
)

CHARS_PER_TOKEN = 4  # an estimate for prompts that are not tokenised yet
EXPECTED_TOKENS = 256  # of an answer whose caller sets no max_tokens

Emit = Callable[[Chunk | Exception], None]

logger = logging.getLogger(__name__)


class Generation:
    """One request and, towards vLLM, the collector of its outputs (a `RequestOutputCollector`).

    `put` is called by vLLM's output handler, on the loop, once per engine step.
    """

    def __init__(
        self, request: GenerationRequest, emit: Emit, ended: Callable[["Generation"], None]
    ) -> None:
        self.request = request
        self.internal_id = ""
        self.is_in_engine = False
        self.token_count = len(request.resume_ids)
        self.deadline: asyncio.TimerHandle | None = None
        self.preparation: asyncio.Task[None] | None = None
        self.verdict: ServeAppError | None = None  # what a stopped generation ends with
        self._emit = emit
        self._ended = ended
        self._is_ended = False
        self._has_sent = False
        self._prompt_token_count = 0
        self._cached_token_count = 0
        self._held_ids: list[int] = []  # of tokens whose text is not complete yet
        self._held_details: ChunkDetails | None = None  # of the same tokens

    def enter(self, made: Any) -> None:
        """The engine takes the request from here on."""
        self.internal_id = made.request_id
        self._prompt_token_count = len(made.prompt_token_ids)
        self.is_in_engine = True

    def put(self, output: Any) -> None:
        """Take one engine step's output for this request, or the engine's death."""
        if isinstance(output, Exception):
            self.end(ConnectionFailedError("the engine died"))
            return
        if self.request.is_embedding:
            self._embed(output)
            return
        completion = output.outputs[0]
        self._held_ids += completion.token_ids
        self.token_count += len(completion.token_ids)
        self._cached_token_count = output.num_cached_tokens or 0
        if completion.logprobs or output.prompt_logprobs or completion.stop_reason is not None:
            self._hold(_details(output))
        reason = completion.finish_reason
        if reason is not None:
            self._finish(reason, completion.text)
        elif completion.text:
            token_ids, self._held_ids = tuple(self._held_ids), []
            # On the bill from the first chunk on: the caller may leave before the last.
            usage = None if self._has_sent else self._usage()
            self._has_sent = True
            self._send(Chunk(completion.text, token_ids, None, usage, self._taken_details()))

    def end(self, error: ServeAppError) -> None:
        """End with an error; a generation that has ended stays as it is."""
        self._last(error)

    def end_as_stopped(self, text: str, token_ids: tuple[int, ...]) -> None:
        """End with the verdict, or as cancelled."""
        details = self._taken_details()
        chunk = Chunk(text, token_ids, FinishReason.CANCELLED, self._usage(), details)
        self._last(self.verdict or chunk)

    def queued_tokens(self) -> int:
        """Tokens that the engine has still to work on, as far as one can tell."""
        limit = self.request.max_tokens or EXPECTED_TOKENS
        rest = max(0, limit - self.token_count)
        if self.token_count > len(self.request.resume_ids):
            return rest
        prompt_tokens = self._prompt_token_count or len(self.request.prompt_token_ids)
        return rest + (prompt_tokens or chars_of(self.request) // CHARS_PER_TOKEN)

    def _embed(self, output: Any) -> None:
        """Take a pooling model's only output; an aborted one is empty."""
        self._cached_token_count = output.num_cached_tokens or 0
        data = output.outputs.data
        if output.error is not None:
            self.end(ConnectionFailedError("the engine gave this request up"))
        elif not data.numel():
            self.end_as_stopped("", ())
        else:
            embedding = data.float().numpy().astype("<f4").tobytes()
            details = ChunkDetails(embedding=embedding)
            self._last(Chunk("", (), FinishReason.STOP, self._usage(), details))

    def _finish(self, reason: str, text: str) -> None:
        token_ids = tuple(self._held_ids)
        if reason == "abort":
            self.end_as_stopped(text, token_ids)
        elif reason == "error" and self._has_grammar():
            self.end(InvalidPromptError("the engine cannot compile the output schema"))
        elif reason == "error":
            self.end(ConnectionFailedError("the engine gave this request up"))
        else:
            # vLLM's third natural end, "repetition", is a stop that the engine chose.
            is_cut = reason == "length"
            known = FinishReason.LENGTH if is_cut else FinishReason.STOP
            self._last(Chunk(text, token_ids, known, self._usage(), self._taken_details()))

    def _has_grammar(self) -> bool:
        options = self.request.engine_options
        return self.request.output_schema is not None or "structured_outputs" in options

    def _hold(self, details: ChunkDetails) -> None:
        held = self._held_details
        self._held_details = details if held is None else held + details

    def _taken_details(self) -> ChunkDetails | None:
        details, self._held_details = self._held_details, None
        return details

    def _usage(self) -> Usage:
        return Usage(self._prompt_token_count, self.token_count, self._cached_token_count)

    def _last(self, output: Chunk | Exception) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        if self.deadline is not None:
            self.deadline.cancel()
        self._ended(self)
        self._send(output)

    def _send(self, output: Chunk | Exception) -> None:
        try:
            self._emit(output)
        except Exception:
            # This runs inside vLLM's output handler: an error here would end every request.
            logger.exception("emit failed", extra={"request_id": self.request.request_id})


def _details(output: Any) -> ChunkDetails:
    completion = output.outputs[0]
    return ChunkDetails(
        _scores(completion.logprobs or ()),
        _scores(output.prompt_logprobs or ()),
        completion.stop_reason,
    )


def _scores(places: Iterable[Any]) -> tuple[tuple[TokenScore, ...], ...]:
    """The mappings that vLLM keeps per token (None for a prompt's first), in its order."""
    return tuple(
        tuple(
            (token_id, score.logprob, score.rank, score.decoded_token)
            for token_id, score in (place or {}).items()
        )
        for place in places
    )

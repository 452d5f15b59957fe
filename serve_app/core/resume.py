"""How an answer goes on at another replica after the first one was lost.

Owns what has been emitted of one answer and the choice of how the rest is had. Calls nobody. Two
ways: *continue*, where the engine takes the emitted tokens as if it had made them itself, and
*replay*, where it makes the whole answer again and what is known already is swallowed. Invariant:
whatever happens, the chunks that leave here are one answer: no token twice, none left out, and the
text is that of the tokens.

Continuing is exact for greedy decoding without a memory of its own (penalties and their like count
what was generated, which a continued request no longer tells from its prompt). Replaying is exact
for whatever is deterministic, penalties and seeds included, as long as the engine's numerics are;
each swallowed token is compared, and from the first that differs the answer is continued instead
and marked approximate, as is what was sampled without a seed.
"""

from dataclasses import dataclass, field, replace

from serve_app.core.errors import ConnectionFailedError
from serve_app.core.inference import (
    NO_USAGE,
    Chunk,
    ChunkDetails,
    FinishReason,
    GenerationRequest,
    Resumed,
    Usage,
)

# Sampling options whose effect does not depend on which tokens were generated before, or which a
# continued request carries on by itself (stop tokens, the grammar).
MEMORYLESS = frozenset(
    {
        "allowed_token_ids",
        "cache_salt",
        "extra_args",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",
        "min_p",
        "min_tokens",
        "prompt_logprobs",
        "skip_reading_prefix_cache",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop_token_ids",
        "structured_outputs",
        "top_k",
    }
)
_REASONING = frozenset({"reasoning_ended", "reasoning_parser_kwargs", "thinking_token_budget"})


class DivergedError(Exception):
    """A replay made another token than the one that was emitted."""


@dataclass(slots=True)
class Answer:
    """One answer over all its attempts, as far as it was emitted."""

    request: GenerationRequest
    token_ids: list[int] = field(default_factory=list)  # at first: those of a lost caller
    text_length: int = 0  # characters, likewise
    usage: Usage = NO_USAGE
    attempt_count: int = 0
    _is_resumed: bool = False
    _is_approximate: bool = False
    _has_diverged: bool = False
    _replay: "_Replay | None" = None

    def next_request(self) -> GenerationRequest:
        """What to ask the next replica; each under an id of its own.

        Raises:
            ConnectionFailedError: this answer cannot be gone on with, neither way.
        """
        self.attempt_count += 1
        self._replay = None
        if not self.token_ids:
            return self._named()
        self._is_resumed = True
        is_replayable = not self._has_diverged and _is_deterministic(self.request)
        if is_replayable and not self._is_continued_exactly():
            self._replay = _Replay(tuple(self.token_ids), self.text_length)
            return self._named()
        if not _REASONING.isdisjoint(self.request.engine_options) and _has_grammar(self.request):
            # Where in the thought the grammar begins is not known here; a guess breaks the JSON.
            raise ConnectionFailedError("the replica was lost in the middle of a guided answer")
        self._is_approximate |= not (is_replayable and self._is_continued_exactly())
        return replace(self._named(), resume_ids=tuple(self.token_ids))

    @property
    def is_complete(self) -> bool:
        """Whether every token was emitted and only the end is missing."""
        may_hold_text = bool(self.request.stop) and not self._has_diverged
        return self._is_at_limit() and not may_hold_text

    def end(self) -> Chunk:
        """The last chunk of an answer whose replica was lost just before it."""
        return Chunk("", (), FinishReason.LENGTH, self.usage, resumed=self._mark())

    def diverged(self) -> None:
        """The replay cannot be followed any further."""
        self._has_diverged = True

    def take(self, chunk: Chunk) -> Chunk | None:
        """The part of a chunk that is new, with the usage of the whole answer; None: nothing.

        Raises:
            DivergedError: see `diverged`.
        """
        if self._replay is not None:
            fresh = self._replay.take(chunk)
            if fresh is None:
                return None
            chunk = fresh
        text, token_ids = chunk.text, chunk.token_ids
        self.token_ids += token_ids
        self.text_length += len(text)
        self._bill(chunk.usage)
        # Not `replace`, which costs as much as the rest: this is done for every token.
        return Chunk(text, token_ids, chunk.finish_reason, self.usage, chunk.details, self._mark())

    def _named(self) -> GenerationRequest:
        if self.attempt_count == 1:
            return self.request
        return replace(self.request, request_id=f"{self.request.request_id}~{self.attempt_count}")

    def _is_continued_exactly(self) -> bool:
        # At the limit, with text held back for a stop string, there is nothing to continue.
        is_greedy = self.request.temperature == 0
        return is_greedy and _is_memoryless(self.request) and not self._is_at_limit()

    def _is_at_limit(self) -> bool:
        return len(self.token_ids) == self.request.max_tokens

    def _bill(self, reported: Usage | None) -> None:
        known = reported or self.usage
        self.usage = Usage(
            known.prompt_tokens,
            max(len(self.token_ids), known.completion_tokens),
            min(known.cached_tokens, known.prompt_tokens),
        )

    def _mark(self) -> Resumed | None:
        if not self._is_resumed:
            return None
        return Resumed.APPROXIMATE if self._is_approximate else Resumed.EXACT


class _Replay:
    """Swallows what is known of an answer that is made again.

    Args:
        known_ids: the tokens that were emitted, one or more.
        text_length: of the text that was emitted with them.
    """

    def __init__(self, known_ids: tuple[int, ...], text_length: int) -> None:
        self._known_ids = known_ids
        self._text_length = text_length
        self._count = 0  # tokens and characters that this attempt has made
        self._said = 0

    def take(self, chunk: Chunk) -> Chunk | None:
        start, self._count = self._count, self._count + len(chunk.token_ids)
        known = self._known_ids[start : self._count]
        if chunk.token_ids[: len(known)] != known:
            raise DivergedError
        said, self._said = self._said, self._said + len(chunk.text)
        if self._count < len(self._known_ids):
            if chunk.finish_reason is not None:
                raise DivergedError
            return None
        text = chunk.text[max(0, self._text_length - said) :]
        token_ids = chunk.token_ids[len(known) :]
        if not text and not token_ids and chunk.finish_reason is None:
            return None
        details = chunk.details and _later(chunk.details, len(known))
        return replace(chunk, text=text, token_ids=token_ids, details=details)


def _later(details: ChunkDetails, count: int) -> ChunkDetails:
    """Details without those of the first tokens."""
    return replace(details, logprobs=details.logprobs[count:], prompt_logprobs=())


def _is_deterministic(request: GenerationRequest) -> bool:
    return request.temperature == 0 or request.seed is not None


def _is_memoryless(request: GenerationRequest) -> bool:
    return MEMORYLESS.issuperset(request.engine_options)


def _has_grammar(request: GenerationRequest) -> bool:
    return request.output_schema is not None or "structured_outputs" in request.engine_options

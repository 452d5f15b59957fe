"""The engine-neutral vocabulary of generation: request, chunk, usage, why it ended.

Owns the plain values that travel between caller, router and replica. Does not know vLLM, links or
HTTP. Invariant: every value here is made of plain, msgpack-able members, because it crosses hosts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

JsonValue: TypeAlias = (
    "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)


MAX_TOKENS_DEFAULT = 512  # of a generate step that names none: an answer, not a whole context
EMBEDDING = "embedding"  # in `engine_options`
SESSION_KEY_MAX = 128  # characters; callers make up names of any length


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the engine counted them; `cached` prompt tokens were not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Measured:
    """One request that an engine has ended.

    Args:
        finish_reason: None where it ended in an error.
        ttft_s: None where no token came.
    """

    usage: Usage
    finish_reason: FinishReason | None
    ttft_s: float | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate, under vLLM's names for the sampling settings.

    Args:
        request_id: unique per call; abort names it.
        model: an id of `/v1/models`; empty for the default model.
        messages: the chat so far, one or more, put through the model's chat template.
        max_tokens: 1 or more; None: up to the context length.
        temperature: 0 is greedy.
        output_schema: a JSON Schema that the whole answer must satisfy; None for free text.
        deadline_ms: Unix epoch; past it the engine aborts. None: no deadline.
        priority: lower runs first (vLLM's rule).
        prompt_token_ids: the prompt as tokens of the model; then `messages` is empty.
        engine_options: further sampling parameters under vLLM's names, and how the engine takes
            the request (`cache_salt`, `reasoning_ended`, `reasoning_parser_kwargs`). An empty
            mapping asks for nothing but text. With `EMBEDDING`, a mapping of pooling parameters,
            an embedding of the prompt is asked for, and no text.
        tenant: whose work it is (a workspace, or one of its users), for fair shares and budgets.
        resume_ids: tokens of the answer that were made elsewhere: the engine goes on behind them,
            and neither repeats them nor their text.
        session: turns of one session go to the replica that holds its KV cache; empty: none.
    """

    request_id: str
    messages: tuple[Message, ...]
    model: str = ""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    output_schema: Mapping[str, JsonValue] | None = None
    deadline_ms: int | None = None
    priority: int = 0
    tenant: str = ""
    session: str = ""
    resume_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    engine_options: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def is_embedding(self) -> bool:
        """Whether an embedding of the prompt is asked for."""
        return EMBEDDING in self.engine_options

    @property
    def session_key(self) -> str:
        """What the routers know the session by: the tenant's own, and bounded; empty: none."""
        return f"{self.tenant}/{self.session}"[:SESSION_KEY_MAX] if self.session else ""


TokenScore: TypeAlias = "tuple[int, float, int | None, str | None]"  # id, log prob., rank, text


@dataclass(frozen=True, slots=True)
class ChunkDetails:
    """What a chunk says beyond its text, to callers that asked for it.

    Args:
        logprobs: for each of the chunk's `token_ids` the tokens that were scored there, the
            sampled one first; empty where nobody asked.
        prompt_logprobs: likewise for each prompt token (the first has none), on the first chunk.
        stop_reason: the stop string or the stop token that ended the answer, on the last chunk.
        embedding: of the prompt, float32 in little-endian order, on the only chunk; empty where
            text was asked for.
    """

    logprobs: tuple[tuple[TokenScore, ...], ...] = ()
    prompt_logprobs: tuple[tuple[TokenScore, ...], ...] = ()
    stop_reason: int | str | None = None
    embedding: bytes = b""

    def __add__(self, later: "ChunkDetails") -> "ChunkDetails":
        return ChunkDetails(
            self.logprobs + later.logprobs,
            self.prompt_logprobs + later.prompt_logprobs,
            later.stop_reason,
            later.embedding,
        )


class Resumed(StrEnum):
    """How an answer went on after its replica was lost."""

    EXACT = "exact"  # as if nothing had happened, up to the engine's numerics
    APPROXIMATE = "approximate"  # plausibly: it was sampled without a seed, or a replay differed


@dataclass(frozen=True, slots=True)
class Chunk:
    """What arrived since the last chunk of the same answer.

    Args:
        text: the text delta; may be empty on the last chunk.
        token_ids: the ids behind the delta.
        finish_reason: set on the last chunk only.
        usage: so far; set on the first chunk and on the last.
        details: log probabilities and the like; None, the common case, where there are none.
        resumed: set once the answer went on at another replica; None, the common case, before.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    details: ChunkDetails | None = None
    resumed: Resumed | None = None


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's own report: what it serves, where, and how busy it is.

    Args:
        host, port: where its link listens.
        queued_tokens: prompt and expected completion tokens of requests not yet finished.
        running_count: requests inside the engine.
        kv_usage: used part of the KV cache, 0 to 1.
        step_count: engine steps so far; it must advance while `running_count` > 0.
        prefill_tokens: of `queued_tokens`, the prompts that have no first token yet.
        prefill_ms: measured: ms of waiting per prompt token that stands before; 0: not yet.
        step_ms: measured: ms between two tokens of one answer; 0: not yet.
        ttft_ms: measured: time to the first token of late answers, smoothed; 0: not yet.
        kv_tokens: what the KV cache holds; 0: not known.
        open_count, slots: requests taken and not ended, and how many it wants at most, so that what
            is more waits where fairness is; 0 slots: any number.
        region, stake: the operator's; stake is a decimal number.
        aborted_count, wasted_tokens: answers that ended before their end, and the tokens made for
            them.
    """

    replica_id: str
    models: tuple[str, ...]
    host: str
    port: int
    queued_tokens: int = 0
    running_count: int = 0
    kv_usage: float = 0.0
    step_count: int = 0
    context_max: int = 0
    prefill_tokens: int = 0
    prefill_ms: float = 0.0
    step_ms: float = 0.0
    ttft_ms: float = 0.0
    kv_tokens: int = 0
    open_count: int = 0
    slots: int = 0
    region: str = ""
    stake: str = "0"
    aborted_count: int = 0
    wasted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request may run.

    Args:
        host: only this replica; empty: any.
        max_latency_ms: only where the first token is expected within it.
        min_stake: only where the stake is at least this decimal number; empty: any.
        region: there, if a replica there is not overloaded; a wish, not a condition.
    """

    host: str = ""
    max_latency_ms: int | None = None
    min_stake: str = ""
    region: str = ""


ANYWHERE = Placement()


@dataclass(frozen=True, slots=True)
class AdmitRequest:
    """What the router needs to know to choose a replica: no prompt text, only sizes and hashes.

    Args:
        token_count: prompt and expected completion tokens.
        excluded: replicas where this request was lost.
        prompt_tokens: the prompt's part of `token_count`, as estimated by the caller.
        prefix: `core.prefix.prefix_of` the prompt.
        tenant, priority, deadline_ms: as in `GenerationRequest`.
        session: its `session_key`.
        is_resumed: the rest of an answer that has begun: it goes before all that has not.
    """

    request_id: str
    model: str
    token_count: int
    excluded: tuple[str, ...] = ()
    prompt_tokens: int = 0
    prefix: tuple[int, ...] = ()
    tenant: str = ""
    session: str = ""
    priority: int = 0
    deadline_ms: int | None = None
    placement: Placement = ANYWHERE
    is_resumed: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """A request's first token, as the replica saw it.

    Args:
        prefix: hashes of the prompt, those that were not told lately.
        cached_tokens: prompt tokens that the engine found in its cache.
        ttft_ms: from the replica's taking the request.
    """

    request_id: str
    session: str
    prefix: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A request's end at one replica, with what it has cost its tenant."""

    request_id: str
    tenant: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ReplicaNews:
    """What happened at a replica since its last report; each thing is told once.

    Args:
        arrived: request ids that its load counts from now on.
    """

    arrived: tuple[str, ...] = ()
    begun: tuple[Begun, ...] = ()
    ended: tuple[Ended, ...] = ()


NO_NEWS = ReplicaNews()


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to run one request on one replica: signed, single-use, short-lived.

    Args:
        expires_at_ms: Unix epoch; the replica refuses it afterwards.
        signature: hex HMAC-SHA256 over the other members, keyed with the cluster secret.
    """

    request_id: str
    replica_id: str
    host: str
    port: int
    expires_at_ms: int
    signature: str

"""What a replica measures of its own work: waiting prompts, pace, news for the routers.

Owns one engine's measurements, whatever the engine. Generates nothing and sends nothing: the engine
behind it does, and the deployment sends the reports. Invariant: each piece of news is told once,
and what waits to be told is bounded; past the bound it is lost, which costs a router a second of
accuracy and no request.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from serve_app.core.inference import (
    Begun,
    Chunk,
    Ended,
    FinishReason,
    GenerationRequest,
    Measured,
    ReplicaLoad,
    ReplicaNews,
    Usage,
)
from serve_app.core.prefix import BLOCK_TOKENS, PrefixIndex, prefix_of, prompt_tokens_guess
from serve_app.ports import Clock, InferenceEngine

NEWS_MAX = 2_048  # of each kind between two reports
TOLD_BLOCKS_MAX = 16_384  # prefix blocks not told again while they are among the last so many
HELD_BLOCKS_MAX = 65_536  # prefix blocks taken as cached, for what waiting prompts will cost
SMOOTHING = 0.1  # of a new measurement in a running mean
PACE_TOKENS_MIN = 32  # shorter prompts say more about a step than about the pace

Emit = Callable[[Chunk | Exception], None]


class MeteredEngine:
    """An `InferenceEngine` that measures the one behind it.

    Args:
        region, stake: what the operator says of this replica.
        slots: requests that it wants at once; see `ReplicaLoad`.
        observe: told of each request that has ended.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        clock: Clock,
        *,
        region: str = "",
        stake: str = "0",
        slots: int = 0,
        observe: Callable[[Measured], None] | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._region = region
        self._stake = stake
        self._slots = slots
        self._open_count = 0
        self._observe = observe
        self._waiting: dict[str, int] = {}  # prompt tokens of requests without a first token
        self._waiting_tokens = 0
        self._arrived: deque[str] = deque(maxlen=NEWS_MAX)
        self._begun: deque[Begun] = deque(maxlen=NEWS_MAX)
        self._ended: deque[Ended] = deque(maxlen=NEWS_MAX)
        self._held = PrefixIndex(HELD_BLOCKS_MAX)
        self._told: OrderedDict[int, None] = OrderedDict()
        self._prefill_ms = 0.0
        self._step_ms = 0.0
        self._ttft_ms = 0.0
        self._aborted_count = 0
        self._wasted_tokens = 0

    @property
    def has_news(self) -> bool:
        """Whether a request ended or began since the last report: room that a router may use."""
        return bool(self._ended or self._begun)

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """See `ports.InferenceEngine`."""
        run = _Run(self, request, emit, self._waiting_tokens, self._clock.monotonic_s())
        known, _ = self._held.overlap(run.prefix)
        to_compute = max(1, run.prompt_tokens - known * BLOCK_TOKENS)
        self._waiting[request.request_id] = to_compute
        self._waiting_tokens += to_compute
        self._arrived.append(request.request_id)
        self._open_count += 1
        try:
            self._engine.submit(request, run.emit)
        except Exception:
            self._open_count -= 1
            self._left(request.request_id)
            raise

    def abort(self, request_id: str) -> None:
        """See `ports.InferenceEngine`."""
        self._engine.abort(request_id)

    def load(self) -> ReplicaLoad:
        """The engine's load with what was measured here."""
        return replace(
            self._engine.load(),
            prefill_tokens=self._waiting_tokens,
            prefill_ms=round(self._prefill_ms, 4),
            step_ms=round(self._step_ms, 3),
            ttft_ms=round(self._ttft_ms, 2),
            open_count=self._open_count,
            slots=self._slots,
            region=self._region,
            stake=self._stake,
            aborted_count=self._aborted_count,
            wasted_tokens=self._wasted_tokens,
        )

    def take_news(self) -> ReplicaNews:
        """What was not told yet."""
        news = ReplicaNews(tuple(self._arrived), tuple(self._begun), tuple(self._ended))
        self._arrived.clear()
        self._begun.clear()
        self._ended.clear()
        return news

    async def check_health(self) -> None:
        """See `ports.InferenceEngine`."""
        await self._engine.check_health()

    async def stop(self) -> None:
        """See `ports.InferenceEngine`."""
        await self._engine.stop()

    def began(self, run: "_Run", usage: Usage | None) -> None:
        """The first chunk of a request has come."""
        self._left(run.request.request_id)
        prompt_tokens = usage.prompt_tokens if usage is not None else run.prompt_tokens
        cached_tokens = usage.cached_tokens if usage is not None else 0
        ttft_ms = (self._clock.monotonic_s() - run.started_at_s) * 1000
        self._ttft_ms = _smooth(self._ttft_ms, ttft_ms)
        computed = run.ahead_tokens + prompt_tokens - cached_tokens
        if computed >= PACE_TOKENS_MIN:
            self._prefill_ms = _smooth(
                self._prefill_ms, max(0.0, ttft_ms - self._step_ms) / computed
            )
        self._held.learn(self._held.overlap(run.prefix)[1] * BLOCK_TOKENS, cached_tokens)
        self._held.hold(run.prefix)
        self._begun.append(
            Begun(
                run.request.request_id,
                run.request.session_key,
                self._untold(run.prefix),
                prompt_tokens,
                cached_tokens,
                round(ttft_ms, 2),
            )
        )

    def ended(self, run: "_Run", output: Chunk | Exception) -> None:
        """The last output of a request has come."""
        self._open_count -= 1
        self._left(run.request.request_id)
        usage = output.usage if isinstance(output, Chunk) else None
        if run.token_count > 1:
            passed_ms = (self._clock.monotonic_s() - run.began_at_s) * 1000
            self._step_ms = _smooth(self._step_ms, passed_ms / (run.token_count - 1))
        if isinstance(output, Exception) or output.finish_reason is FinishReason.CANCELLED:
            self._aborted_count += 1
            self._wasted_tokens += max(run.token_count, usage.completion_tokens if usage else 0)
        spent = usage or Usage(run.prompt_tokens, run.token_count)
        if self._observe is not None:
            self._observe(self._measured(run, output, spent))
        self._ended.append(
            Ended(
                run.request.request_id,
                run.request.tenant,
                spent.prompt_tokens,
                spent.cached_tokens,
                spent.completion_tokens,
            )
        )

    def _measured(self, run: "_Run", output: Chunk | Exception, spent: Usage) -> Measured:
        reason = output.finish_reason if isinstance(output, Chunk) else None
        ttft_s = run.began_at_s - run.started_at_s if run.began_at_s else None
        return Measured(spent, reason, ttft_s, self._clock.monotonic_s() - run.started_at_s)

    def now_s(self) -> float:
        """The clock's monotonic time."""
        return self._clock.monotonic_s()

    def _left(self, request_id: str) -> None:
        self._waiting_tokens -= self._waiting.pop(request_id, 0)

    def _untold(self, prefix: Iterable[int]) -> tuple[int, ...]:
        fresh = tuple(block for block in prefix if block not in self._told)
        self._told.update(dict.fromkeys(fresh))
        while len(self._told) > TOLD_BLOCKS_MAX:
            self._told.popitem(last=False)
        return fresh


class _Run:
    """One request on its way through the engine."""

    __slots__ = (
        "_emit",
        "_meter",
        "ahead_tokens",
        "began_at_s",
        "prefix",
        "prompt_tokens",
        "request",
        "started_at_s",
        "token_count",
    )

    def __init__(
        self,
        meter: MeteredEngine,
        request: GenerationRequest,
        emit: Emit,
        ahead_tokens: int,
        started_at_s: float,
    ) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens_guess(request)
        self.prefix = prefix_of(request)
        self.ahead_tokens = ahead_tokens
        self.started_at_s = started_at_s
        self.began_at_s = 0.0
        self.token_count = 0
        self._meter = meter
        self._emit = emit

    def emit(self, output: Chunk | Exception) -> None:
        """Pass an output on; called once per engine step, so it does little."""
        if isinstance(output, Chunk):
            if not self.began_at_s and output.token_ids:
                self.began_at_s = self._meter.now_s()
                self._meter.began(self, output.usage)
            self.token_count += len(output.token_ids)
            if output.finish_reason is not None:
                self._meter.ended(self, output)
        else:
            self._meter.ended(self, output)
        self._emit(output)


def _smooth(mean: float, value: float) -> float:
    return value if mean == 0 else mean + SMOOTHING * (value - mean)

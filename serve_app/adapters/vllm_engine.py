"""`InferenceEngine` on vLLM's `AsyncLLM`: one engine, and tokens without detours.

Owns the engine, the running generations, their deadlines and the engine's health. Does not speak to
callers (the link does). Invariant: every submitted generation gets exactly one last `emit`: a chunk
with `finish_reason`, or an error.

Outputs are taken where vLLM's output handler puts them, once per engine step: a `Generation` is
the collector of its own request, and its `put` calls `emit`. The usual way, an asyncio queue and a
consumer task per request, costs more than the tokens of a small model (design section 5). For that
this file uses two private methods of `AsyncLLM`; a new vLLM must pass
`tests/integration/test_vllm_engine.py`.
"""

import asyncio
import copy
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from serve_app.adapters.vllm_generation import Emit, Generation
from serve_app.adapters.vllm_prompt import PromptMaker, chars_of
from serve_app.core.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.inference import GenerationRequest, ReplicaLoad
from serve_app.ports import Clock

INLINE_CHARS_MAX = 8_000  # a prompt up to here is tokenised on the loop, in about 2 ms
WAITING_MAX = 256  # prompts that wait for the preparing thread

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to start one engine.

    Args:
        model_path: a directory, or a name that vLLM can resolve.
        served_names: the model's ids at the API, its own first.
        context_max: tokens of prompt and answer; 0: what the model was made for.
        kv_cache_gib: cpu: size of the KV cache.
        enforce_eager: no graph capture or compilation: a faster start.
        dtype: `auto`, `bfloat16`, `float32`, …
        cpu_cores: cpu: one OpenMP thread is bound to each; none: to every core but one.
        gpu_memory_utilization: cuda: the engine's part of the card's memory.
        max_num_seqs: requests in one batch.
        stall_after_s: unhealthy when requests run and no engine step ended for so long; generous,
            because one step of a long prefill is no illness.
        structured_backend: the grammar engine for `output_schema`.
        reasoning_parser: how the model writes its reasoning, which grammars let pass.
        runner: `generate`, `pooling` for embeddings, or `auto`.
    """

    model_path: str
    served_names: tuple[str, ...]
    context_max: int = 0
    kv_cache_gib: float = 1.0
    enforce_eager: bool = True
    dtype: str = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    cpu_cores: tuple[int, ...] = ()
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64
    stall_after_s: float = 60.0
    structured_backend: Literal["guidance", "xgrammar"] = "guidance"
    reasoning_parser: str = ""
    runner: Literal["auto", "generate", "pooling"] = "auto"


def _ignore(_: object) -> None:
    """Observe nothing."""


class VllmEngine:
    """One vLLM engine; made by `start`."""

    def __init__(self, llm: Any, vllm: Any, settings: EngineSettings, clock: Clock) -> None:
        self._llm = llm
        self._vllm = vllm
        self._settings = settings
        self._clock = clock
        self._prompts = PromptMaker(llm, settings.served_names, vllm)
        self._generations: dict[str, Generation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # One thread with a tokenizer of its own: a tokenizer must not be used by two at once.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="prepare-prompt")
        self._threads_tokenizer = copy.deepcopy(llm.get_tokenizer())
        self._waiting_count = 0
        self._step_count = 0
        self._kv_usage = 0.0
        self._alive_at_s = clock.monotonic_s()  # when a step ended, or the idle engine got work

    @classmethod
    def start(
        cls, settings: EngineSettings, clock: Clock, observe_step: Callable[[Any], None] = _ignore
    ) -> "VllmEngine":
        """Start the engine's processes and load the model; blocks for about 20 s on a CPU.

        `observe_step` is told of each engine step, by vLLM's own `SchedulerStats`.

        Works with and without a running event loop in this thread; everything else wants the loop
        on which the engine is used first.
        """
        _set_environment(settings)
        # Imported here: 6 s, and only a model replica needs it.
        import vllm  # noqa: PLC0415
        import vllm.exceptions  # noqa: PLC0415
        import vllm.v1.engine.async_llm as async_llm  # noqa: PLC0415, PLR0402

        engine: VllmEngine | None = None

        def step_ended(stats: Any) -> None:
            if engine is not None:
                engine._step_ended(None if stats is None else stats.kv_cache_usage)
            if stats is not None:
                observe_step(stats)

        config = vllm.AsyncEngineArgs(**_engine_arguments(settings)).create_engine_config()
        with _threads_bound(config):
            llm = async_llm.AsyncLLM.from_vllm_config(
                config,
                stat_loggers=[_step_logger_type(step_ended)],
                disable_log_stats=True,  # its Prometheus numbers cost CPU per token; we count steps
            )
        _drop_front_statistics(llm)
        engine = cls(llm, vllm, settings, clock)
        return engine

    @property
    def is_embedding(self) -> bool:
        """Whether its model gives embeddings, and no text."""
        return self._prompts.is_pooling

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """Start a generation and return at once; see `ports.InferenceEngine`.

        Raises:
            InvalidRequestError: a request of this id runs already.
        """
        if request.request_id in self._generations:
            raise InvalidRequestError("a request of this id is running")
        generation = Generation(request, emit, self._ended)
        self._generations[request.request_id] = generation
        if request.deadline_ms is not None:
            delay_s = max(0, request.deadline_ms - self._clock.now_ms()) / 1000
            loop = asyncio.get_running_loop()
            generation.deadline = loop.call_later(delay_s, self._expire, generation)
        generation.preparation = self._spawn(self._run(generation))

    def abort(self, request_id: str) -> None:
        """Stop a generation; `emit` gets one last chunk, `cancelled`. Unknown ids are ignored."""
        generation = self._generations.get(request_id)
        if generation is not None:
            self._stop(generation)

    def load(self) -> ReplicaLoad:
        """The present load; the link's server adds the replica's name and address."""
        return ReplicaLoad(
            replica_id="",
            models=self._settings.served_names,
            host="",
            port=0,
            queued_tokens=sum(one.queued_tokens() for one in self._generations.values()),
            running_count=sum(one.is_in_engine for one in self._generations.values()),
            kv_usage=self._kv_usage,
            step_count=self._step_count,
            context_max=self._prompts.context_max,
        )

    async def check_health(self) -> None:
        """Raise unless the engine lives and, while requests run, advances.

        Raises:
            ConnectionFailedError: saying which of the two it is.
        """
        try:
            await self._llm.check_health()
        except Exception as error:
            raise ConnectionFailedError("the engine is dead") from error
        is_busy = any(one.is_in_engine for one in self._generations.values())
        still_s = self._clock.monotonic_s() - self._alive_at_s
        if is_busy and still_s > self._settings.stall_after_s:
            raise ConnectionFailedError(f"the engine made no step for {still_s:.0f} s")

    async def stop(self) -> None:
        """Fail what runs and end the engine's processes."""
        for generation in tuple(self._generations.values()):
            generation.end(ConnectionFailedError("the replica stops"))
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        if (handler := self._llm.output_handler) is not None:
            # Ended before its socket, or it logs the end as a failure.
            handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)
        await asyncio.to_thread(self._llm.shutdown)

    async def _run(self, generation: Generation) -> None:
        """Prepare a request and hand it to the engine; whatever fails ends the generation."""
        try:
            made = await self._prepare(generation.request)
            if not any(one.is_in_engine for one in self._generations.values()):
                self._alive_at_s = self._clock.monotonic_s()
            generation.enter(made)
            # Private, but `add_request` would make a queue of its own (see the module's text).
            self._llm._run_output_handler()  # noqa: SLF001
            if generation.request.resume_ids:
                await self._add_continued(made, generation)
            else:
                await self._llm._add_request(made, None, None, 0, generation)  # noqa: SLF001
        except ServeAppError as error:
            generation.end(error)
        except Exception:
            if self._llm.errored:
                generation.end(ConnectionFailedError("the engine is dead"))
            else:
                logger.exception("a generation could not start")
                generation.end(ServeAppError("the engine failed on this request"))
            if generation.is_in_engine:
                # vLLM registers a request before it sends it, so half of it may be there.
                await self._llm.abort(generation.internal_id, internal=True)

    async def _add_continued(self, made: Any, generation: Generation) -> None:
        """Have the core go on behind tokens that the front end takes for its own.

        The detokenizer is given them as output, so that half a character, a stop string's first
        letters and the limit of tokens are where they were at the other replica.
        """
        resume_ids = generation.request.resume_ids
        core = self._prompts.continued(made, resume_ids)
        front = self._llm.output_processor
        front.add_request(made, None, None, 0, generation)
        detokenizer = front.request_states[made.request_id].detokenizer
        detokenizer.update(list(resume_ids), stop_terminated=False)
        detokenizer.get_next_output_text(finished=False, delta=True)
        await self._llm.engine_core.add_request_async(core)

    async def _prepare(self, request: GenerationRequest) -> Any:
        self._prompts.check(request)
        has_grammar = request.output_schema is not None
        has_grammar = has_grammar or "structured_outputs" in request.engine_options
        if chars_of(request) <= INLINE_CHARS_MAX and not has_grammar:
            return self._prompts.make(request, self._llm.get_tokenizer())
        if self._waiting_count >= WAITING_MAX:
            raise OverloadedError("too many long prompts are being prepared")
        work = partial(self._prompts.make, request, self._threads_tokenizer)
        self._waiting_count += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting_count -= 1

    def _expire(self, generation: Generation) -> None:
        generation.verdict = DeadlineExceededError("the deadline passed during the generation")
        self._stop(generation)

    def _stop(self, generation: Generation) -> None:
        """Have a generation end as its verdict says, in the engine too where it got so far."""
        extra = {"request_id": generation.request.request_id, "tokens": generation.token_count}
        if generation.is_in_engine:
            # vLLM answers with a last output (text that waited for a stop string); that ends it.
            self._spawn(self._abort_in_engine(generation.internal_id, extra))
            return
        if generation.preparation is not None:
            generation.preparation.cancel()
        generation.end_as_stopped("", ())
        logger.info("generation aborted", extra=extra)

    async def _abort_in_engine(self, internal_id: str, extra: dict[str, object]) -> None:
        await self._llm.abort(internal_id, internal=True)
        logger.info("generation aborted", extra=extra)

    def _ended(self, generation: Generation) -> None:
        self._generations.pop(generation.request.request_id, None)

    def _step_ended(self, kv_usage: float | None) -> None:
        self._step_count += 1
        self._alive_at_s = self._clock.monotonic_s()
        if kv_usage is not None:
            self._kv_usage = kv_usage

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # Not a TaskGroup: the tasks belong to requests that come and go, and `stop` ends them.
        task = asyncio.create_task(coroutine)  # noqa: TID251
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "runner": settings.runner,
        "served_model_name": list(settings.served_names),
        "reasoning_parser": settings.reasoning_parser,
        "max_model_len": settings.context_max or None,
        "enforce_eager": settings.enforce_eager,
        "dtype": settings.dtype,
        "max_num_seqs": settings.max_num_seqs,
        "scheduler_cls": "serve_app.adapters.vllm_scheduler.scheduler",
        "scheduling_policy": "priority",  # equal priorities are served in order of arrival
        # Without it a small model fills its answer with white space up to max_tokens.
        "structured_outputs_config": {
            "backend": settings.structured_backend,
            "disable_any_whitespace": True,
        },
    }
    if settings.device == "cpu":
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
        arguments["worker_cls"] = "serve_app.adapters.vllm_worker.SeedSafeWorker"
        # The model runs in the engine's own process, as on a GPU. vLLM's way on a CPU, one more
        # process, makes both spin for each other: in every step that takes a core from the rest.
        # By its full name, because vLLM replaces the short one (it would set no threads).
        arguments["distributed_executor_backend"] = (
            "vllm.v1.executor.uniproc_executor.UniProcExecutor"
        )
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return arguments


def _set_environment(settings: EngineSettings) -> None:
    """Set what vLLM takes from the environment only; its processes inherit it."""
    environment = os.environ  # noqa: TID251 - vLLM has no argument for these
    environment["VLLM_NO_USAGE_STATS"] = "1"  # nothing is reported to anyone
    if settings.device == "cpu" and settings.cpu_cores:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, settings.cpu_cores))


@contextmanager
def _threads_bound(config: Any) -> Iterator[None]:
    """Have processes that start meanwhile run OpenMP on the cores that vLLM means for an engine.

    OpenMP reads its settings when it is loaded, so they must be in the environment of the engine's
    process from the start. Off a CPU this changes nothing.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager  # noqa: PLC0415

    with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        yield


def _drop_front_statistics(llm: Any) -> None:
    """Keep the engine core's statistics, one message per step, and drop the front's, per token.

    Nobody reads the latter, and they cost 4 of 15 µs of CPU per token (64 streams of a 0.85 M
    model, 2 cores, November 2026).
    """
    llm.log_stats = False
    llm.output_processor.log_stats = False
    if llm.output_handler is not None:  # started with the statistics on; it has not run yet
        llm.output_handler.cancel()
        llm.output_handler = None
        llm._run_output_handler()  # noqa: SLF001


def _step_logger_type(step_ended: Callable[[Any], None]) -> type:
    """A stat logger that only tells that a step ended and what the scheduler says of it.

    It is a `PrometheusStatLogger` by type and by nothing else: beside any other logger vLLM adds
    that one by itself, and its counters cost more per step than the step's tokens.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger  # noqa: PLC0415

    class StepLogger(PrometheusStatLogger):
        def __init__(self, *_: object, **__: object) -> None:
            """Start no counters."""

        def record(self, scheduler_stats: Any, *_: object, **__: object) -> None:
            step_ended(scheduler_stats)

        def log_engine_initialized(self) -> None:
            """Say nothing."""

        def log(self) -> None:
            """Say nothing."""

        def record_sleep_state(self, *_: object, **__: object) -> None:
            """Count nothing."""

        def record_admission_rejection(self, reason: str) -> None:
            """Count nothing."""

    return StepLogger

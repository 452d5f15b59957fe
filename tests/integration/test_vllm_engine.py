"""The vLLM engine with a tiny random model: one engine, about 25 s to start, for all tests."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

pytest.importorskip("vllm")

from serve_app.adapters.model_weights import ModelFilesError, check_model_dir
from serve_app.adapters.system import SystemClock
from serve_app.adapters.vllm_engine import EngineSettings, VllmEngine
from serve_app.core.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidPromptError,
    InvalidRequestError,
    ModelNotAvailableError,
    ServeAppError,
)
from serve_app.core.inference import Chunk, FinishReason, GenerationRequest, Message
from tests.support.tiny_model import VOCABULARY_SIZE, make_tiny_model

CONTEXT = 512
SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["bug", "praise"]}, "sure": {"type": "boolean"}},
    "required": ["label", "sure"],
    "additionalProperties": False,
}

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    # vLLM, torch and transformers warn about each other; theirs to mend.
    pytest.mark.filterwarnings("default"),
]


class Answer:
    """Collects what one generation emits."""

    def __init__(self) -> None:
        self.outputs: list[Chunk | Exception] = []
        self._ended = asyncio.Event()
        self._started = asyncio.Event()

    def emit(self, output: Chunk | Exception) -> None:
        self.outputs.append(output)
        self._started.set()
        if isinstance(output, Exception) or output.finish_reason is not None:
            self._ended.set()

    async def started(self) -> None:
        await asyncio.wait_for(self._started.wait(), 30)

    async def ended(self) -> Chunk:
        """Wait for the last output; return it, or raise it."""
        await asyncio.wait_for(self._ended.wait(), 60)
        last = self.outputs[-1]
        if isinstance(last, Exception):
            raise last
        return last

    @property
    def chunks(self) -> list[Chunk]:
        return [output for output in self.outputs if isinstance(output, Chunk)]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def last_count(self) -> int:
        ends = [chunk for chunk in self.chunks if chunk.finish_reason is not None]
        return len(ends) + len(self.outputs) - len(self.chunks)


def request(request_id: str, **settings: object) -> GenerationRequest:
    plain = GenerationRequest(
        request_id, (Message("user", "tell me a tale"),), max_tokens=20, temperature=0.0
    )
    return replace(plain, **settings)  # type: ignore[arg-type]


def ask(engine: VllmEngine, asked: GenerationRequest) -> Answer:
    answer = Answer()
    engine.submit(asked, answer.emit)
    return answer


async def complete(engine: VllmEngine, asked: GenerationRequest) -> Answer:
    answer = ask(engine, asked)
    await answer.ended()
    return answer


async def until_idle(engine: VllmEngine) -> None:
    async with asyncio.timeout(10):
        while engine.load().running_count or engine._llm.get_num_unfinished_requests():
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    path = make_tiny_model(tmp_path_factory.mktemp("tiny"), context_max=CONTEXT)
    settings = EngineSettings(str(path), ("tiny", "alias"), kv_cache_gib=0.25, dtype="float32")
    engine = VllmEngine.start(settings, SystemClock())
    yield engine
    await engine.stop()


async def test_generates_with_usage_and_length(engine: VllmEngine) -> None:
    answer = await complete(engine, request("length"))
    last = await answer.ended()
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert last.usage.completion_tokens == len(answer.token_ids) == 20
    assert last.usage.prompt_tokens > 10
    assert answer.text
    assert len(answer.chunks) > 1, "streamed, not collected"
    assert all(chunk.text for chunk in answer.chunks[:-1])


async def test_prompt_of_tokens_gives_the_answer_of_its_text(engine: VllmEngine) -> None:
    told = await complete(engine, request("text"))
    ids = engine._llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "tell me a tale"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    as_tokens = request("tokens", messages=(), prompt_token_ids=tuple(ids))
    answer = await complete(engine, as_tokens)
    assert answer.token_ids == told.token_ids
    assert (await answer.ended()).usage.prompt_tokens == len(ids)  # type: ignore[union-attr]


async def test_log_probabilities_come_with_every_token(engine: VllmEngine) -> None:
    options = {"logprobs": 2, "prompt_logprobs": 1}
    answer = await complete(engine, request("scores", engine_options=options))
    details = [chunk.details for chunk in answer.chunks if chunk.details is not None]
    scores = [at for one in details for at in one.logprobs]
    assert [at[0][0] for at in scores] == answer.token_ids, "the sampled one first, in order"
    assert all(len(at) >= 2 and at[0][1] <= 0 for at in scores)
    for chunk in answer.chunks:
        assert len(chunk.token_ids) == len(chunk.details.logprobs if chunk.details else ())
    of_prompt = [at for one in details for at in one.prompt_logprobs]
    last = await answer.ended()
    assert last.usage is not None
    assert len(of_prompt) == last.usage.prompt_tokens
    assert of_prompt[0] == ()


async def test_further_sampling_parameters_reach_the_engine(engine: VllmEngine) -> None:
    plain = await complete(engine, request("plain"))
    first = plain.token_ids[0]
    banned = request("banned", engine_options={"logit_bias": {str(first): -100}})
    assert (await complete(engine, banned)).token_ids[0] != first
    stopped = await complete(engine, request("st", engine_options={"stop_token_ids": [first]}))
    last = await stopped.ended()
    assert last.finish_reason is FinishReason.STOP
    assert last.details is not None
    assert last.details.stop_reason == first
    regex = {"structured_outputs": {"regex": "(yes|no)!"}}
    assert (await complete(engine, request("rx", engine_options=regex))).text in {"yes!", "no!"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("no token", {"prompt_token_ids": (VOCABULARY_SIZE,)}),
        ("too many", {"prompt_token_ids": (1,) * CONTEXT}),
        ("unknown", {"engine_options": {"best_of": 2}}),
        ("too many scores", {"engine_options": {"logprobs": 1000}}),
        ("not a regex", {"engine_options": {"structured_outputs": {"regex": "("}}}),
        ("two grammars", {"engine_options": {"structured_outputs": {"regex": "a", "json": "{}"}}}),
    ],
)
async def test_hostile_options_are_refused(
    engine: VllmEngine, name: str, settings: dict[str, object]
) -> None:
    with pytest.raises(InvalidPromptError):
        await complete(engine, request(name, **settings))
    await complete(engine, request("still alive"))


async def test_greedy_answers_repeat(engine: VllmEngine) -> None:
    first = await complete(engine, request("g1"))
    second = await complete(engine, request("g2"))
    assert first.token_ids == second.token_ids
    assert first.text == second.text


async def test_seeded_answers_repeat_and_other_seeds_differ(engine: VllmEngine) -> None:
    ids = [
        (await complete(engine, request(f"s{n}", temperature=1.0, seed=seed))).token_ids
        for n, seed in enumerate([7, 7, 8])
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 40},
        {"max_tokens": 40, "stop": ("qqqq", "never said")},
        {"max_tokens": 60, "output_schema": SCHEMA},
        {"max_tokens": 24, "output_schema": {"type": "array", "items": {"type": "integer"}}},
        {"max_tokens": 12, "engine_options": {"min_tokens": 12, "logprobs": 1}},
    ],
)
async def test_an_answer_goes_on_behind_tokens_made_elsewhere(
    engine: VllmEngine, settings: dict[str, object]
) -> None:
    whole = await complete(engine, request("whole", **settings))
    chunks = whole.chunks
    assert len(chunks) > 4
    for count in range(1, len(chunks)):
        known = [token for chunk in chunks[:count] for token in chunk.token_ids]
        asked = request(f"after-{count}", resume_ids=tuple(known), **settings)
        rest = await complete(engine, asked)
        assert known + rest.token_ids == whole.token_ids
        assert "".join(chunk.text for chunk in chunks[:count]) + rest.text == whole.text
        assert rest.chunks[-1].finish_reason is chunks[-1].finish_reason
        usage, expected = rest.chunks[-1].usage, chunks[-1].usage
        assert usage is not None
        assert expected is not None
        assert usage.completion_tokens == expected.completion_tokens
        assert usage.prompt_tokens == expected.prompt_tokens


async def test_a_stop_string_that_began_elsewhere_is_found(engine: VllmEngine) -> None:
    plain = await complete(engine, request("plain", max_tokens=30))
    turn = next(n for n in range(2, 20) if plain.text[n - 1] != plain.text[n])
    stop = plain.text[turn - 1 : turn + 1]
    whole = await complete(engine, request("whole", max_tokens=30, stop=(stop,)))
    assert whole.text == plain.text[: plain.text.index(stop)]
    for count in range(1, len(whole.token_ids)):
        known = tuple(whole.token_ids[:count])
        asked = request(f"after-{count}", max_tokens=30, stop=(stop,), resume_ids=known)
        rest = await complete(engine, asked)
        assert [*known, *rest.token_ids] == whole.token_ids
        assert whole.text.endswith(rest.text)


async def test_a_grammar_refuses_tokens_that_it_would_not_have_made(engine: VllmEngine) -> None:
    asked = request("odd", max_tokens=40, output_schema=SCHEMA, resume_ids=(40, 41, 42))
    with pytest.raises(InvalidPromptError):
        await complete(engine, asked)
    await until_idle(engine)
    assert (await complete(engine, request("next"))).token_ids


async def test_seeds_survive_cut_prompts(engine: VllmEngine) -> None:
    """More prompt tokens at once than a step takes, so that vLLM cuts some prompts in two."""

    def seeded(name: str) -> GenerationRequest:
        long = (Message("user", f"{name[-2:]} " + "a different start " * 25),)
        return request(name, messages=long, temperature=1.0, seed=int(name[-2:]), max_tokens=8)

    alone = [(await complete(engine, seeded(f"alone {n:02}"))).token_ids for n in range(40)]
    await engine._llm.reset_prefix_cache()
    crowd = [ask(engine, seeded(f"crowd {n:02}")) for n in range(40)]
    for answer in crowd:
        await answer.ended()
    assert [answer.token_ids for answer in crowd] == alone


async def test_without_max_tokens_the_context_is_the_limit(engine: VllmEngine) -> None:
    last = await (await complete(engine, request("open", max_tokens=None))).ended()
    assert last.usage is not None
    assert last.usage.total_tokens <= CONTEXT
    assert last.finish_reason in {FinishReason.LENGTH, FinishReason.STOP}


async def test_long_prompt_seen_before_is_cached(engine: VllmEngine) -> None:
    long = (Message("user", "the same start " * 25),)
    await complete(engine, request("c1", messages=long))
    last = await (await complete(engine, request("c2", messages=long))).ended()
    assert last.usage is not None
    assert last.usage.cached_tokens > 0


async def test_stop_string_ends_the_answer_and_is_left_out(engine: VllmEngine) -> None:
    text = (await complete(engine, request("plain"))).text
    stop = text[5:8]
    answer = await complete(engine, request("stop", stop=(stop,)))
    assert (await answer.ended()).finish_reason is FinishReason.STOP
    assert answer.text == text[: text.index(stop)]


@pytest.mark.parametrize(
    "schema", [SCHEMA, {"type": "array", "items": {"const": 1}, "maxItems": 2}]
)
async def test_answer_satisfies_the_schema(engine: VllmEngine, schema: dict[str, object]) -> None:
    name = f"schema-{schema['type']}"
    answer = await complete(engine, request(name, output_schema=schema, max_tokens=60))
    value = json.loads(answer.text)
    if schema is SCHEMA:
        assert value["label"] in {"bug", "praise"}
        assert set(value) == {"label", "sure"}
    else:
        assert value in ([], [1], [1, 1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"output_schema": {"type": "wrong"}}, InvalidPromptError, "wrong"),
        ({"output_schema": {"type": 5}}, InvalidPromptError, "engine refuses"),
        ({"messages": ()}, InvalidPromptError, "empty"),
        ({"messages": (Message("user", ""),)}, InvalidPromptError, "empty"),
        ({"messages": (Message("user", "word " * 400),)}, InvalidPromptError, f"{CONTEXT} tokens"),
        ({"messages": (Message("user", "x" * 9000),)}, InvalidPromptError, f"{CONTEXT} tokens"),
        ({"messages": (Message("user", "x" * 10**6),)}, InvalidPromptError, f"{CONTEXT} tokens"),
        ({"temperature": -1.0}, InvalidPromptError, "temperature"),
        ({"top_p": 0.0}, InvalidPromptError, "top_p"),
        ({"max_tokens": 0}, InvalidPromptError, "max_tokens"),
        ({"seed": 2**70}, InvalidPromptError, "seed"),
        ({"priority": -(2**63) - 1}, InvalidPromptError, "priority"),
        ({"temperature": float("nan")}, InvalidPromptError, "temperature"),
        ({"top_p": float("nan")}, InvalidPromptError, "top_p"),
        ({"model": "other"}, ModelNotAvailableError, "available: tiny"),
    ],
)
async def test_refusals_say_why(
    engine: VllmEngine, change: dict[str, object], error: type[ServeAppError], words: str
) -> None:
    answer = ask(engine, request("refused", **change))
    with pytest.raises(error, match=words):
        await answer.ended()
    assert answer.last_count == 1
    assert engine.load().queued_tokens == 0


async def test_same_id_twice_is_refused(engine: VllmEngine) -> None:
    answer = ask(engine, request("twice"))
    with pytest.raises(InvalidRequestError):
        engine.submit(request("twice"), answer.emit)
    await answer.ended()


async def test_abort_midway_ends_once_and_frees_the_engine(
    engine: VllmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve_app")
    answer = ask(engine, request("abort", max_tokens=400))
    await answer.started()
    assert engine.load().running_count == 1
    engine.abort("abort")
    engine.abort("abort")
    last = await answer.ended()
    assert last.finish_reason is FinishReason.CANCELLED
    assert last.usage is not None
    assert 0 < last.usage.completion_tokens == len(answer.token_ids) < 400
    assert last.usage.prompt_tokens > 0
    await until_idle(engine)
    await asyncio.sleep(0.2)
    assert answer.last_count == 1
    (record,) = [one for one in caplog.records if one.message == "generation aborted"][:1]
    assert record.__dict__["request_id"] == "abort"


async def test_abort_before_the_engine_has_it_ends_once(engine: VllmEngine) -> None:
    answers = [ask(engine, request("early")), ask(engine, request("long", output_schema=SCHEMA))]
    engine.abort("early")
    await asyncio.sleep(0)
    engine.abort("long")
    for answer in answers:
        last = await answer.ended()
        assert last.finish_reason is FinishReason.CANCELLED
        assert last.usage is not None
        assert last.usage.completion_tokens == 0
        assert answer.last_count == 1
    engine.abort("never seen")
    await until_idle(engine)


@pytest.mark.parametrize("after_ms", [-1000, 0, 50])
async def test_deadline_ends_the_generation(engine: VllmEngine, after_ms: int) -> None:
    deadline_ms = SystemClock().now_ms() + after_ms
    answer = ask(engine, request("late", max_tokens=480, deadline_ms=deadline_ms))
    with pytest.raises(DeadlineExceededError):
        await answer.ended()
    assert answer.last_count == 1
    await until_idle(engine)


async def test_deadline_in_time_is_not_felt(engine: VllmEngine) -> None:
    deadline_ms = SystemClock().now_ms() + 60_000
    await complete(engine, request("in time", deadline_ms=deadline_ms))


async def test_many_at_once_are_each_complete(engine: VllmEngine) -> None:
    alone = (await complete(engine, request("alone"))).token_ids
    answers = [ask(engine, request(f"m{n}", max_tokens=10 + n)) for n in range(100)]
    assert engine.load().queued_tokens > 0
    for count, answer in enumerate(answers, start=10):
        last = await answer.ended()
        assert last.usage is not None
        assert last.usage.completion_tokens == len(answer.token_ids) == count
        assert answer.token_ids[:10] == alone[:10]
    assert engine.load().queued_tokens == 0


async def test_emit_that_fails_hurts_no_other(engine: VllmEngine) -> None:
    def broken(_: Chunk | Exception) -> None:
        raise RuntimeError("a broken consumer")

    engine.submit(request("broken"), broken)
    await complete(engine, request("whole"))
    await until_idle(engine)


async def test_request_that_cannot_be_sent_is_forgotten(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: object) -> None:
        raise OverflowError("a number that does not fit")

    with monkeypatch.context() as patched:
        patched.setattr(engine._llm.engine_core, "add_request_async", refuse)
        answer = ask(engine, request("unsent"))
        with pytest.raises(ServeAppError, match="failed on this request"):
            await answer.ended()
    await until_idle(engine)
    assert answer.last_count == 1


async def test_load_and_health_follow_the_steps(engine: VllmEngine) -> None:
    before = engine.load().step_count
    await complete(engine, request("steps"))
    load = engine.load()
    assert load.step_count - before >= 20
    assert load.models == ("tiny", "alias")
    assert load.context_max == CONTEXT
    await engine.check_health()


async def test_engine_that_stands_still_with_work_is_ill(engine: VllmEngine) -> None:
    core = engine_core(engine)
    settings = engine._settings
    answer = ask(engine, request("stalled", max_tokens=400))
    await answer.started()
    core.suspend()
    try:
        await engine.check_health()
        engine._settings = replace(settings, stall_after_s=0.2)
        await asyncio.sleep(0.5)
        with pytest.raises(ConnectionFailedError, match="no step"):
            await engine.check_health()
    finally:
        core.resume()
        engine._settings = settings
    await answer.ended()
    engine._settings = replace(settings, stall_after_s=0.0)
    await engine.check_health()
    engine._settings = settings


async def test_dead_engine_fails_what_runs_and_what_comes(engine: VllmEngine) -> None:
    """The last test with this engine, for the engine does not survive it."""
    answer = ask(engine, request("dying", max_tokens=480))
    await answer.started()
    os.kill(engine_core(engine).pid, signal.SIGKILL)
    with pytest.raises(ConnectionFailedError):
        await answer.ended()
    assert answer.last_count == 1
    with pytest.raises(ConnectionFailedError):
        await complete(engine, request("after"))
    with pytest.raises(ConnectionFailedError, match="dead"):
        await engine.check_health()


def engine_core(engine: VllmEngine) -> psutil.Process:
    """The process that runs vLLM's scheduler."""
    (process,) = engine._llm.engine_core.resources.engine_manager.processes
    return psutil.Process(process.pid)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
async def test_directory_that_is_no_model_is_named(
    tmp_path: Path, missing: str, words: str
) -> None:
    make_tiny_model(tmp_path / "m")
    check_model_dir(tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    with pytest.raises(ModelFilesError, match=words):
        check_model_dir(tmp_path / "m")
    with pytest.raises(ModelFilesError, match="no directory"):
        check_model_dir(tmp_path / "none")

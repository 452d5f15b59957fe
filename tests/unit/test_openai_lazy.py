"""The serving code of OpenAI's API is waited for, but not for ever."""

import asyncio
import logging
from collections.abc import AsyncGenerator

import pytest

from serve_app.adapters.system import SystemEntropy
from serve_app.adapters.vllm_openai_lazy import LOAD_WAIT_S, LazyOpenAi
from serve_app.core.errors import ModelNotAvailableError, OverloadedError, ServeAppError
from serve_app.core.inference import Chunk, GenerationRequest
from serve_app.ports import OpenAiCall, OpenAiModel
from tests.support.virtual_time import VirtualClock, virtual_time

MODELS = (OpenAiModel("/m/one", ("acme/one", "one")), OpenAiModel("/m/two", ("two",)))
CALL = OpenAiCall("r1", None, lambda: None, lambda usage, is_whole: None)


async def silent(request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
    raise AssertionError("nothing is to be generated")
    yield


def lazy(*, has_model: bool = False) -> LazyOpenAi:
    return LazyOpenAi(MODELS, silent, lambda: has_model, VirtualClock(), SystemEntropy())


@virtual_time
async def test_unknown_model_is_told_at_once_which_there_are() -> None:
    with pytest.raises(ModelNotAvailableError, match="acme/one, one, two"):
        await lazy().answer("chat/completions", {"model": "three"}, CALL)


@virtual_time
async def test_call_gives_up_when_the_code_does_not_load_in_time() -> None:
    started_s = asyncio.get_running_loop().time()
    with pytest.raises(OverloadedError, match="starting"):
        await lazy().answer("chat/completions", {"model": "two"}, CALL)
    assert asyncio.get_running_loop().time() - started_s == LOAD_WAIT_S


async def test_failed_load_is_logged_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object) -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(LazyOpenAi, "_load", fail)
    serving = lazy(has_model=True)
    running = asyncio.ensure_future(serving.run())
    with caplog.at_level(logging.ERROR), pytest.raises(ServeAppError, match="could not start"):
        await serving.answer("chat/completions", {}, CALL)
    assert "does not load" in caplog.text
    running.cancel()
    await asyncio.wait((running,))

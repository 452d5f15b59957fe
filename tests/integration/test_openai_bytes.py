"""The quick way of plain streams has the bytes of vLLM's own, but for times."""

import importlib
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from serve_app.adapters.system import SystemEntropy
from serve_app.core.errors import ConnectionFailedError
from serve_app.core.inference import Chunk, ChunkDetails, FinishReason, GenerationRequest, Usage
from serve_app.ports import OpenAiCall, OpenAiModel
from tests.support.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from serve_app.adapters.vllm_openai import VllmOpenAi

# vLLM, torch and transformers warn about each other; theirs to mend.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(120)]

PLAIN = "serve_app.adapters.vllm_openai_plain"
END = Chunk("", (9,), FinishReason.STOP, Usage(5, 4, 2), ChunkDetails(stop_reason="\n"))
CUT = Chunk("end", (9, 9), FinishReason.LENGTH, Usage(5, 4, 2))
ODD = "".join(map(chr, range(0x300))) + "\u2028\u2029\ufeff\ufffd𝄞"
ANSWERS: dict[str, list[Chunk | Exception]] = {
    "usual": [Chunk("a", (1,), usage=Usage(5, 1, 2)), Chunk(" b", (2, 3)), Chunk("c", (4,)), CUT],
    "stopped": [Chunk("a", (1,), usage=Usage(5, 1, 2)), Chunk("b", (2,)), END],
    "at once": [CUT],
    "nothing": [Chunk("", (), FinishReason.STOP, Usage(5, 0, 0))],
    "two": [Chunk("a", (1,), usage=Usage(5, 1, 2)), END],
    "odd": [
        Chunk(ODD, (1,)),
        Chunk('"content":"', (2,)),
        Chunk('\\"text":', (3,)),
        Chunk(ODD),
        END,
    ],
    "cancelled": [Chunk("a", (1,)), Chunk("b", (2,)), Chunk("", (), FinishReason.CANCELLED)],
    "lost": [Chunk("a", (1,)), Chunk("b", (2,)), ConnectionFailedError("the replica was lost")],
}
CHAT = ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    CHAT,
    (CHAT[0], {**CHAT[1], "stream_options": {"include_usage": True}}),
    (CHAT[0], {**CHAT[1], "model": 'say "content":'}),
    ("completions", {"prompt": "hi"}),
    ("completions", {"prompt": [1, 2], "stream_options": {"include_usage": True}}),
]


class Scripted:
    """Says an answer of the table."""

    def __init__(self) -> None:
        self.answer = "usual"

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        for item in ANSWERS[self.answer]:
            if isinstance(item, Exception):
                raise item
            yield item


@pytest.fixture(scope="module")
def script() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module", params=["hermes", ""])
def serving(
    request: pytest.FixtureRequest, script: Scripted, tmp_path_factory: pytest.TempPathFactory
) -> "VllmOpenAi":
    # Not at the top: torch warns while it is imported, which would fail the collection.
    from serve_app.adapters.vllm_openai import VllmOpenAi  # noqa: PLC0415

    path: Path = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    model = OpenAiModel(str(path), ("tiny", 'say "content":'), tool_parser=request.param)
    return VllmOpenAi(model, script.generate, SystemEntropy())


async def stream_of(
    serving: "VllmOpenAi", kind: str, body: dict[str, Any]
) -> tuple[list[bytes], Usage]:
    billed: list[tuple[Usage, bool]] = []
    call = OpenAiCall("r1", None, lambda: None, lambda usage, whole: billed.append((usage, whole)))
    answer = await serving.answer(kind, {**body, "stream": True, "max_tokens": 50}, call)
    assert answer.status == 200
    assert not isinstance(answer.body, bytes)
    events = [re.sub(rb'"created":\d+', b'"created":0', event) async for event in answer.body]
    ((usage, _),) = billed
    return events, usage


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(("kind", "body"), REQUESTS)
async def test_both_ways_give_the_same_bytes(
    serving: "VllmOpenAi",
    script: Scripted,
    name: str,
    kind: str,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script.answer = name
    taken: list[object] = []
    spliced = importlib.import_module(PLAIN)._spliced
    monkeypatch.setattr(f"{PLAIN}._spliced", lambda *a, **k: taken.append(a) or spliced(*a, **k))
    quick = await stream_of(serving, kind, body)
    assert taken, "the quick way is the way of these requests"
    monkeypatch.setattr(f"{PLAIN}._is_plain", lambda request: False)
    monkeypatch.setattr(f"{PLAIN}._spliced", lambda *_, **__: pytest.fail("the quick way"))
    slow = await stream_of(serving, kind, body)
    assert b"".join(quick[0]) == b"".join(slow[0])
    assert quick[1] == slow[1]
    assert quick[0][-1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "wish",
    [
        {"n": 2},
        {"logprobs": True},
        {"echo": True},
        {"return_token_ids": True},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
)
async def test_whatever_asks_for_more_goes_vllms_way(
    serving: "VllmOpenAi", script: Scripted, wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    script.answer = "at once"
    monkeypatch.setattr(f"{PLAIN}._spliced", lambda *_, **__: pytest.fail("the quick way"))
    await stream_of(serving, CHAT[0], {**CHAT[1], **wish})

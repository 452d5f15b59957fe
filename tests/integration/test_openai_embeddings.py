"""Embeddings over the real link and a real engine, by OpenAI's own client."""

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI
from transformers import AutoModel, AutoTokenizer

from serve_app.services.canary import sing
from tests.support.openai_service import CONTEXT, KEY, NAMES, OpenAiService, running_openai

MODEL = NAMES[0]
TEXTS = ["The sea is wide.", "An old clock in a tower", "moon"]
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    # vLLM, torch and transformers warn about each other; theirs to mend.
    pytest.mark.filterwarnings("default"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[OpenAiService]:
    path = tmp_path_factory.mktemp("embeddings")
    async with running_openai(valkey_url, path, is_embedding=True) as running:
        running.model_path = path / "model"
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(service: OpenAiService) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=service.url, api_key=KEY, max_retries=0) as opened:
        yield opened


def expected(path: Path, texts: list[str]) -> tuple[torch.Tensor, int]:
    """The last token's state, of length 1, by transformers; and how many tokens there were."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    rows, count = [], 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        count += ids.shape[1]
        with torch.no_grad():
            rows.append(model(ids).last_hidden_state[0, -1])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1), count


async def test_embeddings_are_the_models_own(service: OpenAiService, client: AsyncOpenAI) -> None:
    made = await client.embeddings.create(model=MODEL, input=TEXTS)
    wanted, count = expected(service.model_path, TEXTS)
    found = torch.tensor([row.embedding for row in made.data])
    assert [row.index for row in made.data] == [0, 1, 2]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert (made.model, made.object) == (MODEL, "list")
    assert (made.usage.prompt_tokens, made.usage.total_tokens) == (count, count)
    as_floats = await client.embeddings.create(
        model=NAMES[1], input=TEXTS[0], encoding_format="float"
    )
    torch.testing.assert_close(
        torch.tensor(as_floats.data[0].embedding), found[0], atol=1e-5, rtol=1e-4
    )


async def test_tokens_are_a_prompt_too(service: OpenAiService, client: AsyncOpenAI) -> None:
    tokenizer = AutoTokenizer.from_pretrained(service.model_path)
    ids = tokenizer(TEXTS[0])["input_ids"]
    by_text, by_ids = [
        (await client.embeddings.create(model=MODEL, input=given)).data[0].embedding
        for given in (TEXTS[0], ids)
    ]
    torch.testing.assert_close(torch.tensor(by_text), torch.tensor(by_ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"input": []}, openai.BadRequestError),
        ({"input": {"a": 1}}, openai.BadRequestError),
        ({"input": "long " * CONTEXT}, openai.BadRequestError),
        ({"dimensions": 7}, openai.BadRequestError),
        ({"encoding_format": "bytes"}, openai.BadRequestError),
        ({"encoding_format": "roman"}, openai.BadRequestError),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_what_cannot_be_embedded_is_refused(
    client: AsyncOpenAI, wish: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await client.embeddings.create(**{"model": MODEL, "input": "x", **wish})
    assert (await client.embeddings.create(model=MODEL, input="x")).data


async def test_a_model_of_embeddings_gives_no_text(
    service: OpenAiService, client: AsyncOpenAI
) -> None:
    asked = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        await client.chat.completions.create(model=MODEL, messages=asked)
    with pytest.raises(Exception, match="gives embeddings, not text"):
        await sing(service.engine)
    await sing(service.engine, is_embedding=True)

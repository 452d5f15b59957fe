"""OpenAI's API with its own unmodified client, over a tiny vLLM engine, without Ray."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

pytest.importorskip("vllm")

from tests.support.openai_service import CONTEXT, KEY, NAMES, OpenAiService, running_openai

MODEL = NAMES[0]
ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "tell me a tale"}],
    "max_tokens": 8,
    "temperature": 0,
}
SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["bug", "praise"]}},
    "required": ["label"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "file_ticket", "parameters": SCHEMA, "strict": True},
}

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
    async with running_openai(valkey_url, tmp_path_factory.mktemp("openai")) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(service: OpenAiService) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=service.url, api_key=KEY, max_retries=0) as opened:
        yield opened


async def test_chat_answers_with_usage(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**ASK)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == 8 + answer.usage.prompt_tokens


async def test_stream_says_the_same_and_ends_with_usage(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**ASK)
    stream = await client.chat.completions.create(
        **ASK, stream=True, stream_options={"include_usage": True}
    )
    events = [event async for event in stream]
    assert len(events) > 4, "streamed, not collected"
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": events[-1].usage.prompt_tokens_details}
    )
    assert len({event.id for event in events}) == 1


async def test_sync_client_and_every_alias_work(service: OpenAiService) -> None:
    def ask(name: str) -> str:
        with OpenAI(base_url=service.url, api_key=KEY, max_retries=0) as sync:
            stream = sync.chat.completions.create(**{**ASK, "model": name}, stream=True)
            return "".join(e.choices[0].delta.content or "" for e in stream)

    answers = {await asyncio.to_thread(ask, name) for name in NAMES}
    assert len(answers) == 1


async def test_models_are_listed_and_ids_may_hold_slashes(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == list(NAMES)
    found = await client.models.retrieve(MODEL)
    assert found.id == MODEL
    assert found.to_dict()["max_model_len"] == CONTEXT
    with pytest.raises(openai.NotFoundError, match=MODEL):
        await client.models.retrieve("no/such")


async def test_answers_differ_between_choices_and_repeat_with_a_seed(client: AsyncOpenAI) -> None:
    wish = {**ASK, "temperature": 1, "n": 3, "seed": 7}
    first, second = [await client.chat.completions.create(**wish) for _ in range(2)]
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    assert first.usage is not None
    assert first.usage.completion_tokens == 24
    streamed = ["", "", ""]
    async for event in await client.chat.completions.create(**wish, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


async def test_stop_string_ends_the_answer_and_is_left_out(client: AsyncOpenAI) -> None:
    whole = (await client.chat.completions.create(**ASK)).choices[0].message.content
    assert whole is not None
    stop = whole[2:4]
    answer = await client.chat.completions.create(**ASK, stop=[stop])
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == whole.split(stop)[0]
    assert choice.to_dict()["stop_reason"] == stop


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_log_probabilities(client: AsyncOpenAI, *, is_streamed: bool) -> None:
    wish = {**ASK, "logprobs": True, "top_logprobs": 2}
    if is_streamed:
        stream = await client.chat.completions.create(**wish, stream=True)
        told = [e.choices[0].logprobs async for e in stream if e.choices[0].logprobs]
    else:
        told = [(await client.chat.completions.create(**wish)).choices[0].logprobs]
    places = [place for one in told for place in one.content]
    assert len(places) == 8
    for place in places:
        assert len(place.top_logprobs) == 2
        assert place.logprob == pytest.approx(place.top_logprobs[0].logprob), "greedy"
        assert place.logprob >= place.top_logprobs[1].logprob


async def test_answer_satisfies_the_json_schema(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        **{**ASK, "max_tokens": 60},
        response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}},
    )
    assert json.loads(answer.choices[0].message.content or "")["label"] in {"bug", "praise"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "file_ticket"}}]
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_tool_is_called_with_valid_arguments(
    client: AsyncOpenAI, choice: Any, *, is_streamed: bool
) -> None:
    # At most one call: a model that has learnt nothing calls until its tokens run out.
    wish = {**ASK, "max_tokens": 150, "tools": [TOOL], "tool_choice": choice}
    wish["parallel_tool_calls"] = False
    name, arguments = "", ""
    if is_streamed:
        async for event in await client.chat.completions.create(**wish, stream=True):
            for call in event.choices[0].delta.tool_calls or ():
                name += (call.function and call.function.name) or ""
                arguments += (call.function and call.function.arguments) or ""
            reason = event.choices[0].finish_reason
    else:
        answer = (await client.chat.completions.create(**wish)).choices[0]
        (call,) = answer.message.tool_calls or ()
        name, arguments, reason = call.function.name, call.function.arguments, answer.finish_reason
    assert name == "file_ticket"
    assert json.loads(arguments)["label"] in {"bug", "praise"}
    assert reason in {"tool_calls", "stop"}


async def test_strict_tools_leave_the_model_free_to_talk(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**ASK, tools=[TOOL], tool_choice="auto")
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


async def test_completions_take_texts_and_tokens(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt=["a b", "c"], max_tokens=4, n=2, logprobs=1, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert all(len(choice.logprobs.tokens) == 4 for choice in answer.choices if choice.logprobs)
    echoed = await client.completions.create(
        model=MODEL, prompt="a b", max_tokens=2, echo=True, logprobs=1
    )
    assert echoed.choices[0].text.startswith("a b")
    assert echoed.choices[0].logprobs.token_logprobs[0] is None  # type: ignore[union-attr]
    tokens = await client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=1)
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3
    stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=4, stream=True)
    assert "".join([event.choices[0].text async for event in stream])


async def test_responses(client: AsyncOpenAI) -> None:
    wish: dict[str, Any] = {"model": MODEL, "input": "hello", "max_output_tokens": 6}
    answer = await client.responses.create(**wish, temperature=0)
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == 6
    events = [e async for e in await client.responses.create(**wish, temperature=0, stream=True)]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text
    assert events[-1].type in {"response.completed", "response.incomplete"}


@pytest.mark.parametrize(
    ("wish", "status", "words"),
    [
        ({"model": "no/such"}, 404, f"Available: {NAMES[0]}, {NAMES[1]}"),
        ({"messages": []}, 400, "empty"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x " * CONTEXT}]}, 400, "length"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": CONTEXT + 1}, 400, "max_tokens"),
        ({"n": 0}, 400, "n must be"),
        ({"top_logprobs": 100, "logprobs": True}, 400, "logprobs"),
        ({"logit_bias": {"100000": 1}}, 400, "logit_bias"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "objekt"}}}}, 400, "objekt"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}},
         400, "no"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]}]},
         400, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_bad_requests_are_refused_with_their_status(
    client: AsyncOpenAI, wish: dict[str, Any], status: int, words: str, *, is_streamed: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await client.chat.completions.create(**{**ASK, **wish}, stream=is_streamed)
    assert refused.value.status_code == status
    assert words in refused.value.message
    assert {"message", "type", "param", "code"} <= set(refused.value.body)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"{}", 400),
        (b'{"model": 3}', 404),
        (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
        (b" " * (10 << 20) + b"{}", 413),
    ],
)
async def test_hostile_bodies_get_openais_envelope(
    service: OpenAiService, body: bytes, status: int
) -> None:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as http:
        answer = await http.post(f"{service.url}/chat/completions", content=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_wrong_key_and_missing_features_are_told(service: OpenAiService) -> None:
    async with AsyncOpenAI(base_url=service.url, api_key="ip_wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            await stranger.chat.completions.create(**ASK)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
    async with AsyncOpenAI(base_url=service.url, api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="embeddings"):
            await client.embeddings.create(model=MODEL, input="x")


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_full_fleet_is_a_503_even_for_a_stream(
    service: OpenAiService, client: AsyncOpenAI, *, is_streamed: bool
) -> None:
    service.admission.is_open = False
    try:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(**ASK, stream=is_streamed)
    finally:
        service.admission.is_open = True
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_leaving_caller_aborts_in_the_engine(
    service: OpenAiService, client: AsyncOpenAI, count: int, *, is_streamed: bool
) -> None:
    endless = {**ASK, "max_tokens": 480, "n": count, "temperature": 1}
    endless["extra_body"] = {"ignore_eos": True}
    steps_before = service.engine.load().step_count

    async def ask() -> None:
        answer = await client.chat.completions.create(**endless, stream=is_streamed)
        async for _ in answer:
            pass

    caller = asyncio.ensure_future(ask())
    await service.until_running(count)
    caller.cancel()
    await asyncio.wait((caller,))
    await service.until_running(0)
    assert service.engine.load().step_count - steps_before < 400, "it was cut short"


async def test_answer_goes_on_over_a_broken_link(
    service: OpenAiService, client: AsyncOpenAI
) -> None:
    long = {**ASK, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    whole = await client.chat.completions.create(**long)
    assert "resumed" not in whole.model_extra
    text, is_broken, marks = "", False, []
    async for event in await client.chat.completions.create(**long, stream=True):
        text += event.choices[0].delta.content or ""
        marks.append(event.model_extra.get("resumed"))
        if text and not is_broken:
            is_broken = True
            service.break_links()
    assert is_broken
    assert text == whole.choices[0].message.content
    assert (marks[0], marks[-1]) == (None, "exact")


async def test_an_answer_sampled_anew_says_so(service: OpenAiService, client: AsyncOpenAI) -> None:
    asked = {**ASK, "max_tokens": 400, "temperature": 1, "extra_body": {"ignore_eos": True}}
    asked.pop("seed", None)
    answering = asyncio.ensure_future(client.chat.completions.create(**asked))
    await service.until_running(1)
    await asyncio.sleep(0.05)  # a few tokens; where it is none, the answer is simply made anew
    service.break_links()
    whole = await answering
    assert whole.model_extra.get("resumed") in {"approximate", None}
    marks = []
    async for event in await client.chat.completions.create(**asked, stream=True):
        marks.append(event.model_extra.get("resumed"))
        if len(marks) == 5:
            service.break_links()
    assert marks[-1] == "approximate"


async def test_lost_replica_ends_a_stream_with_an_error_event(
    service: OpenAiService, client: AsyncOpenAI
) -> None:
    endless = {**ASK, "max_tokens": 480, "extra_body": {"ignore_eos": True}}

    async def read() -> None:
        async for event in await client.chat.completions.create(**endless, stream=True):
            if event.choices[0].delta.content and service.admission.is_open:
                service.admission.is_open = False
                service.break_links()

    try:
        with pytest.raises(openai.APIError, match="replica"):
            await read()
    finally:
        service.admission.is_open = True
    await service.until_running(0)

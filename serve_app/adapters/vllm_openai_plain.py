"""Streams of plain text without vLLM's work per token, and with its bytes.

vLLM builds and serialises four pydantic objects for each token, 15 to 20 us here (2 cores, November
2026), more than anything else between engine and socket. Most streams need none of that: one
answer, text alone. For those vLLM makes the first events and the last ones; those between are its
first content event with another text in it. Owns the choice of such requests and the splicing.
Invariant: the bytes are vLLM's (`tests/integration/test_openai.py` compares both ways).
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from pydantic_core import to_json
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

from serve_app.adapters.vllm_link_client import CALL
from serve_app.core.inference import Chunk


class PlainChat(OpenAIServingChat):
    """vLLM's chat handler, for requests without tools to a model without reasoning."""

    def chat_completion_stream_generator(
        self, request: Any, result_generator: Any, *given: Any, **named: Any
    ) -> AsyncGenerator[str, None]:
        """Splice where the request is plain."""
        serve = super().chat_completion_stream_generator

        def events(outputs: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
            return serve(request, outputs, *given, **named)

        if not _is_plain(request) or request.logprobs or request.return_prompt_text:
            return events(result_generator)
        CALL.get().is_plain = True
        return _spliced(result_generator, events, head_count=2, key="content")


class PlainCompletion(OpenAIServingCompletion):
    """vLLM's completion handler."""

    def completion_stream_generator(
        self, request: Any, engine_inputs: Any, result_generator: Any, *given: Any, **named: Any
    ) -> AsyncGenerator[str, None]:
        """Splice where the request is plain."""
        serve = super().completion_stream_generator

        def events(outputs: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
            return serve(request, engine_inputs, outputs, *given, **named)

        if not _is_plain(request) or request.logprobs is not None or len(engine_inputs) != 1:
            return events(result_generator)
        CALL.get().is_plain = True
        return _spliced(result_generator, events, head_count=1, key="text")


def _is_plain(request: Any) -> bool:
    """Whether nothing but the text changes from one event to the next."""
    options = request.stream_options
    has_usage_everywhere = options is not None and options.continuous_usage_stats
    asks_more = request.echo or request.return_token_ids or request.use_beam_search
    return request.n in (None, 1) and not has_usage_everywhere and not asks_more


async def _spliced(
    items: AsyncGenerator[Any, None],
    serve: Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]],
    *,
    head_count: int,
    key: str,
) -> AsyncGenerator[str, None]:
    """Events of one answer.

    Args:
        items: from `LinkEngineClient.generate`: an output, chunks, and the last output; a
            completion's come in pairs with the number of their prompt.
        serve: vLLM's generator of events over outputs. It is pulled only while there is an output
            for it, so it never waits.
        head_count: how many events it makes of the first output; the last one has the text.
        key: of the text in that event.
    """
    waiting: list[Any] = []

    async def outputs() -> AsyncIterator[Any]:
        while waiting:
            item = waiting.pop()
            if isinstance(item, Exception):
                raise item
            yield item

    events = serve(outputs())
    before = event = after = ""
    try:
        async for item in items:
            thing = item[1] if isinstance(item, tuple) else item
            if isinstance(thing, Chunk):
                yield f"{before}{to_json(thing.text).decode()}{after}"
                continue
            waiting.append(item)
            if thing.finished:
                break
            for _ in range(head_count):
                event = await anext(events)
                yield event
            before, after = _envelope(event, key, thing.outputs[0].text)
    except Exception as error:  # noqa: BLE001 - vLLM makes the event of it, as if it had met it
        waiting.append(error)
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()
        await items.aclose()


def _envelope(event: str, key: str, text: str) -> tuple[str, str]:
    """What stands before and after the text. Quotes in JSON strings are escaped: the key is one."""
    before, mark, after = event.partition(f'"{key}":')
    encoded = to_json(text).decode()
    assert mark, "vLLM's content events have this member"
    assert after.startswith(encoded), "and the text in it, as pydantic encodes it"
    return before + mark, after[len(encoded) :]

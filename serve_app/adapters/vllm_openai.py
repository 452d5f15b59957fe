"""OpenAI's API by vLLM's own serving classes: validation, templates, tools, reasoning, answers.

Owns one `VllmOpenAi` per model: its configuration and tokenizer in this process, and vLLM's chat,
completions and responses handlers over a `LinkEngineClient`, or that of embeddings. Knows nothing
of HTTP but statuses. Invariant: an error before the first byte is raised or answered with its
status; none becomes an event in a stream that began well.

Imports vLLM: 6 s and 0.5 GB, so `vllm_openai_lazy` imports this in a thread.
"""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from http import HTTPStatus
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.renderers.online_renderer import OnlineRenderer

from serve_app.adapters.vllm_link_client import CALL, CallState, LinkEngineClient
from serve_app.adapters.vllm_openai_embeddings import KIND, embedder, parse_embedding
from serve_app.adapters.vllm_openai_plain import PlainChat, PlainCompletion
from serve_app.core.errors import ModelNotAvailableError, ServeAppError
from serve_app.ports import Entropy, Generate, OpenAiAnswer, OpenAiCall, OpenAiModel

logger = logging.getLogger(__name__)

_PROBLEMS_SHOWN_MAX = 10
_CONTENT_FORMAT = "auto"  # vLLM looks into the template for it


class VllmOpenAi:
    """One model behind OpenAI's API.

    Args:
        model: where its configuration and tokenizer lie, and the ids it answers to.
    """

    def __init__(self, model: OpenAiModel, generate: Generate, entropy: Entropy) -> None:
        client = LinkEngineClient(_config(model), model.names[0], generate, entropy)
        engine = cast("EngineClient", client)
        self.context_max: int = client.model_config.max_model_len
        paths = [BaseModelPath(name=name, model_path=name) for name in model.names]
        models = OpenAIServingModels(engine, paths)
        self._name = model.names[0]
        self._kinds: dict[str, tuple[Callable[[object], Any], Callable[[Any], Any]]]
        if client.model_config.runner_type == "pooling":
            self._kinds = {KIND: (parse_embedding, embedder(engine, models))}
            return
        shared: dict[str, Any] = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": _CONTENT_FORMAT,
        }
        parsers: dict[str, Any] = {
            "enable_auto_tools": bool(model.tool_parser),
            "tool_parser": model.tool_parser or None,
            "reasoning_parser": model.reasoning_parser,
        }
        config = client.model_config
        renderer = OnlineRenderer(config, client.renderer, **shared, **parsers)
        renderer.warmup()
        shared["enable_prompt_tokens_details"] = True
        chat: dict[str, Any] = {"online_renderer": renderer, **shared}
        self._chat = OpenAIServingChat(engine, models, "assistant", **chat, **parsers)
        # Parsing costs as much per token as all else; without tools there is nothing to parse.
        self._plain_chat = (
            self._chat if model.reasoning_parser else PlainChat(engine, models, "assistant", **chat)
        )
        self._completion = PlainCompletion(
            engine,
            models,
            online_renderer=renderer,
            request_logger=None,
            enable_prompt_tokens_details=True,
        )
        self._responses = OpenAIServingResponses(engine, models, renderer, **shared, **parsers)
        self._kinds = {
            "chat/completions": (ChatCompletionRequest.model_validate, self._complete_chat),
            "completions": (CompletionRequest.model_validate, self._completion.create_completion),
            "responses": (ResponsesRequest.model_validate, self._responses.create_responses),
        }

    async def answer(self, kind: str, body: object, call: OpenAiCall) -> OpenAiAnswer:
        """See `ports.OpenAiServing.answer`."""
        if kind not in self._kinds:
            known = ", ".join(self._kinds)
            refusal = f"the model `{self._name}` does not offer {kind}; it offers {known}"
            raise ModelNotAvailableError(refusal)
        parse, handle = self._kinds[kind]
        state = CallState(call)
        CALL.set(state)
        answer = None
        try:
            request = parse(body)
            if kind != "responses":  # whose ids have a form of their own
                request.request_id = call.request_id
            answer = await _answer(await handle(request), state)
        except ServeAppError:
            raise
        except ValidationError as error:
            answer = _refusal(_validation_error(error))
        # vLLM refuses with any kind of error, and has one table for what they mean.
        except Exception as error:
            if state.error is not None:
                raise state.error from error
            answer = _refusal(create_error_response(error))
            if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.exception("vLLM's serving code failed")
        finally:
            if answer is None or isinstance(answer.body, bytes):
                is_whole = answer is not None and answer.status == HTTPStatus.OK
                call.report_usage(state.total(), is_whole)
        return answer

    async def _complete_chat(self, request: ChatCompletionRequest) -> Any:
        handler = self._chat if request.tools else self._plain_chat
        return await handler.create_chat_completion(request)


async def _answer(made: Any, state: CallState) -> OpenAiAnswer:
    if isinstance(made, ErrorResponse):
        if state.error is not None:
            raise state.error
        return _refusal(made)
    if isinstance(made, OpenAiAnswer):
        return made
    if isinstance(made, BaseModel):
        return OpenAiAnswer(200, _marked(made.model_dump_json(by_alias=True).encode(), b"{", state))
    events = _encoded(made)
    first = []
    # Until the engine has begun, a refusal can still have its status.
    while not state.has_begun and state.error is None:
        event = await anext(events, None)
        if event is None:
            break
        first.append(event)
    if state.error is not None:
        await events.aclose()
        raise state.error
    return OpenAiAnswer(200, _rest(b"".join(first), events, state))


async def _rest(
    first: bytes, events: AsyncGenerator[bytes, None], state: CallState
) -> AsyncGenerator[bytes, None]:
    CALL.set(state)  # a tool's result may begin a further generation in this task
    is_whole = False
    try:
        yield first
        async for event in events:
            yield event if state.resumed is None else _marked(event, b"data: {", state)
        is_whole = state.error is None
    finally:
        await events.aclose()
        state.call.report_usage(state.total(), is_whole)


def _marked(body: bytes, before: bytes, state: CallState) -> bytes:
    """The same JSON object with a member of ours, which OpenAI's clients pass on as an extra."""
    if state.resumed is None:
        return body
    return body.replace(before, before + b'"resumed":"%b",' % state.resumed.encode(), 1)


async def _encoded(made: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    """Server-sent events: chat and completions make their own text, Responses makes objects."""
    async for event in made:
        if isinstance(event, str):
            yield event.encode()
        else:
            data = event.model_dump_json(indent=None, by_alias=True)
            yield f"event: {event.type}\ndata: {data}\n\n".encode()


def _refusal(error: ErrorResponse) -> OpenAiAnswer:
    return OpenAiAnswer(int(error.error.code), error.model_dump_json().encode())


def _validation_error(error: ValidationError) -> ErrorResponse:
    problems = error.errors(include_url=False, include_input=False)
    shown = [f"{clean_loc_for_param(one['loc'])}: {one['msg']}" for one in problems]
    more = len(shown) - _PROBLEMS_SHOWN_MAX
    text = "; ".join(shown[:_PROBLEMS_SHOWN_MAX]) + (f"; and {more} more" if more > 0 else "")
    return create_error_response(text, param=clean_loc_for_param(problems[0]["loc"]))


def _config(model: OpenAiModel) -> VllmConfig:
    """The model's configuration as vLLM's own render-only server makes it: without a device."""
    limit: dict[str, Any] = {"max_model_len": model.context_max} if model.context_max else {}
    arguments = AsyncEngineArgs(
        model=model.path,
        served_model_name=list(model.names),
        reasoning_parser=model.reasoning_parser,
        runner=cast("Any", model.runner),
        language_model_only=True,  # no image is fetched for anyone
        **limit,
    )
    config = arguments.create_model_config()
    config.quantization = None  # nothing is computed here
    return VllmConfig(
        model_config=config,
        structured_outputs_config=arguments.create_structured_outputs_config(),
    )

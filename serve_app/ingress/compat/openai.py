"""OpenAI's API: chat completions, completions, responses, embeddings, models.

Owns the paths, OpenAI's error envelope and the watch over the caller; the answers are made behind
`ports.OpenAiServing`. Invariant: a caller that leaves, at whatever moment, ends its generation.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from serve_app.core.auth import Scope
from serve_app.core.errors import (
    ConnectionFailedError,
    ErrorCode,
    ModelNotAvailableError,
    ServeAppError,
)
from serve_app.core.inference import Usage
from serve_app.core.usage import Spending, Waste
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import Services, services_of
from serve_app.ingress.bodies import parse_json, read_body
from serve_app.ingress.direct_route import DirectRoute
from serve_app.ingress.errors import STATUS, error_headers
from serve_app.ingress.openapi import described
from serve_app.ports import OpenAiAnswer, OpenAiCall, OpenAiModel, OpenAiServing

logger = logging.getLogger(__name__)

# A caller that went away is noticed so soon even where a proxy hides it. Not sooner: each sign
# of life also starts the caller's read time-out anew.
SIGN_OF_LIFE_S = 2.0
_GONE = 499  # nginx's; nobody reads it but the log
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_OPENAI_CODE: Mapping[ErrorCode, str] = MappingProxyType(
    {  # those that OpenAI has a name for; the others keep ours, in lower case
        ErrorCode.UNAUTHORIZED: "invalid_api_key",
        ErrorCode.MODEL_NOT_AVAILABLE: "model_not_found",
    }
)
_OPENAI_TYPE: Mapping[int, str] = MappingProxyType(
    {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
)


class _OpenAiRoute(DirectRoute):
    """A route whose refusals have OpenAI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_in_envelope(request: Request) -> Response:
            try:
                return await handle(request)
            except ServeAppError as error:
                return error_response(error)

        return handle_in_envelope


router = APIRouter(prefix="/v1", tags=["openai"], route_class=_OpenAiRoute)

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "object"}}}},
    **{
        status: {
            "description": error["description"],
            "content": {"application/json": {"schema": _ERROR_SCHEMA}},
        }
        for status, error in ERRORS.items()
    },
}
_ERRORS[404]["content"]["application/problem+json"] = {"schema": {"type": "object"}}  # no route
_GENERATED: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {
        "description": "The completion, or with `stream` its chunks as server-sent events",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "object"}},
        },
    },
}


def _takes(member: str, schema: dict[str, object], example: object) -> dict[str, Any]:
    """A body of which OpenAI's reference says the rest."""
    model = {"type": "string"}
    body = {
        "type": "object",
        "required": [member],
        "properties": {"model": model, "stream": {"type": "boolean"}, member: schema},
    }
    return described(body, example={"model": "SmolLM2-135M-Instruct", member: example})


@router.post(
    "/chat/completions",
    responses=_GENERATED,
    openapi_extra=_takes(
        "messages",
        {"type": "array", "items": {"type": "object"}},
        [{"role": "user", "content": "Hi"}],
    ),
    summary="OpenAI: chat completion",
)
async def create_chat_completion(request: Request) -> Response:
    """As vLLM's own server: tools, logprobs, structured output and `stream_options` included."""
    return await _generated(request, "chat/completions")


@router.post(
    "/completions",
    responses=_GENERATED,
    openapi_extra=_takes("prompt", {}, "Once upon a time"),
    summary="OpenAI: completion of a text or of tokens",
)
async def create_completion(request: Request) -> Response:
    """As vLLM's own server."""
    return await _generated(request, "completions")


@router.post(
    "/responses",
    responses=_GENERATED,
    openapi_extra=_takes("input", {}, "Say hello."),
    summary="OpenAI: response",
)
async def create_response(request: Request) -> Response:
    """As vLLM's own server; responses are not stored."""
    return await _generated(request, "responses")


@router.post(
    "/embeddings",
    responses=_ERRORS,
    openapi_extra=_takes("input", {}, "hello"),
    summary="OpenAI: embeddings",
)
async def create_embeddings(request: Request) -> Response:
    """As vLLM's own server, of a model that gives them; 404 of any other."""
    return await _generated(request, "embeddings")


@router.get("/models", responses=_ERRORS, summary="OpenAI: the models")
async def list_models(request: Request) -> Response:
    """Every name a model answers to is an entry."""
    cards = await _cards(request)
    return json_response({"object": "list", "data": list(cards.values())})


@router.get("/models/{model_id:path}", responses=_ERRORS, summary="OpenAI: one model")
async def get_model(request: Request, model_id: str) -> Response:
    """Ids may hold slashes."""
    cards = await _cards(request)
    if model_id not in cards:
        names = ", ".join(cards)
        raise ModelNotAvailableError(f"The model `{model_id}` does not exist. Available: {names}.")
    return json_response(cards[model_id])


def error_response(error: ServeAppError) -> Response:
    """An error in OpenAI's envelope."""
    code = ErrorCode(error.code)
    status = STATUS[code]
    default = "server_error" if status >= 500 else "invalid_request_error"  # noqa: PLR2004 - HTTP's border
    body = {
        "message": str(error),
        "type": _OPENAI_TYPE.get(status, default),
        "param": "model" if code is ErrorCode.MODEL_NOT_AVAILABLE else None,
        "code": _OPENAI_CODE.get(code, code.lower()),
    }
    return json_response({"error": body}, status, error_headers(error))


async def _generated(request: Request, kind: str) -> Response:
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.EXECUTE)
    serving = _serving(services)
    settings = services.settings
    body = await read_body(request, settings.body_max_bytes)
    value = parse_json(body, settings.json_depth_max)
    begun = asyncio.Event()
    deadline_ms = services.clock.now_ms() + settings.timeout_default_ms

    def report(usage: Usage, is_whole: bool) -> None:  # noqa: FBT001 - the port's signature
        if usage.total_tokens:
            spending = Spending(
                id=services.entropy.token(),
                workspace=principal.workspace,
                workflow_id=f"openai:{kind}",
                key_id=principal.key_id,
                at_ms=services.clock.now_ms(),
                usage=usage,
                wasted_tokens=0 if is_whole else usage.total_tokens,
                waste=None if is_whole else Waste.CANCELLED,
            )
            services.detached(_bill(services, spending))

    call = OpenAiCall(
        request.state.request_id,
        deadline_ms,
        begun.set,
        report,
        tenant=principal.workspace,
        session=request.headers.get("x-session-id", ""),
    )
    work = services.detached(serving.answer(kind, value, call))
    try:
        has_stayed = await _watched(request, work, begun)
    except BaseException:
        work.cancel()
        raise
    if not has_stayed:
        work.cancel()
        return Response(status_code=_GONE)
    if not work.done():
        return StreamingResponse(_waited(work), 200, media_type="application/json")
    return _response(work.result())


async def _watched(
    request: Request, work: asyncio.Task[OpenAiAnswer], begun: asyncio.Event
) -> bool:
    """Wait for the answer, or until it takes long; false when the caller has left meanwhile."""
    departure = asyncio.ensure_future(_departure(request))  # noqa: TID251 - ends below
    try:
        while not work.done():
            waited = (work, departure)
            await asyncio.wait(waited, timeout=SIGN_OF_LIFE_S, return_when=asyncio.FIRST_COMPLETED)
            if departure.done() and not work.done():
                return False
            if begun.is_set() and not work.done():
                return True
        return True
    finally:
        departure.cancel()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _waited(work: asyncio.Task[OpenAiAnswer]) -> AsyncGenerator[bytes, None]:
    """White space, which JSON allows before a value, then the answer.

    Only by writing can one be sure that the caller is still there (see `POST /v1/execute`). What
    fails now has its status behind it, so the connection is cut off: no client takes that for an
    answer.
    """
    try:
        while not work.done():
            yield b" "
            await asyncio.wait((work,), timeout=SIGN_OF_LIFE_S)
        answer = work.result()
        if answer.status != 200 or not isinstance(answer.body, bytes):  # noqa: PLR2004 - HTTP's OK
            raise ConnectionFailedError("the generation failed after the answer had begun")
        yield answer.body
    finally:
        work.cancel()


def _response(answer: OpenAiAnswer) -> Response:
    if isinstance(answer.body, bytes):
        return Response(answer.body, answer.status, media_type="application/json")
    return StreamingResponse(answer.body, answer.status, _SSE_HEADERS, "text/event-stream")


def _serving(services: Services) -> OpenAiServing:
    if services.openai is None:
        raise ModelNotAvailableError("no model is served here")
    return services.openai


async def _cards(request: Request) -> dict[str, dict[str, object]]:
    services = services_of(request)
    await services.authenticator.principal(request, Scope.READ)
    models = () if services.openai is None else services.openai.models
    return {name: _card(name, model) for model in models for name in model.names}


def _card(name: str, model: OpenAiModel) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "inferpipe",
        "root": model.names[0],
        "parent": None,
        "max_model_len": model.context_max or None,
    }


async def _bill(services: Services, spending: Spending) -> None:
    try:
        await services.usage.add(spending)
    except ServeAppError:  # the caller has the answer; the log has the loss
        logger.exception("a call was not billed", extra={"tokens": spending.usage.total_tokens})

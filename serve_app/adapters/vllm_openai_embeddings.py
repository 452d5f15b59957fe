"""Embeddings by vLLM's own serving class, for models that give them.

Owns what differs from text: the request's many forms, and an answer that vLLM makes as a whole HTTP
response. Invariant: an answer is one JSON body; vLLM's binary forms are refused.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import TypeAdapter
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.renderers.chat_utils import ChatTemplateConfig

from serve_app.ports import OpenAiAnswer

KIND = "embeddings"
_FORMATS = ("float", "base64")
_REQUESTS: TypeAdapter[Any] = TypeAdapter(EmbeddingRequest)


def parse_embedding(body: object) -> Any:
    """The request.

    Raises:
        ValueError: it is none, or asks for another form than JSON.
    """
    request = _REQUESTS.validate_python(body)
    if request.encoding_format not in _FORMATS:
        raise ValueError(f"encoding_format must be one of {', '.join(_FORMATS)}")
    return request


def embedder(
    engine: EngineClient, models: OpenAIServingModels
) -> Callable[[Any], Awaitable[OpenAiAnswer]]:
    """What makes embeddings of requests."""
    serving: Any = ServingEmbedding
    serve = serving(engine, models, request_logger=None, chat_template_config=ChatTemplateConfig())

    async def embed(request: Any) -> OpenAiAnswer:
        made = await serve(request)
        return OpenAiAnswer(made.status_code, bytes(made.body))

    return embed

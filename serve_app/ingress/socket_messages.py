"""The messages of `/v1/ws`, read and written.

Owns which error code the protocol tells our own by, and the words of its refusals. Invariant: what
a client gets validates as `inferpipe.wire.ServerMessage`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from inferpipe.wire import SOCKET_REQUEST_ID_MAX, ClientMessage, InferenceMessage
from serve_app.core.errors import (
    BodyTooLargeError,
    ErrorCode,
    InvalidPromptError,
    InvalidRequestError,
    ServeAppError,
)
from serve_app.core.inference import FinishReason, Resumed, Usage

Json = dict[str, object]

# The codes of the protocol that our own are told by; any other keeps its name.
CODES: Mapping[ErrorCode, str] = MappingProxyType(
    {
        ErrorCode.TIMEOUT: "INFERENCE_TIMEOUT",
        ErrorCode.OVERLOADED: "NO_HOSTS_AVAILABLE",
        ErrorCode.FORBIDDEN: "UNAUTHORIZED",
        ErrorCode.STALE_LEASE: "CONNECTION_FAILED",
        ErrorCode.MALFORMED_JSON: "INVALID_REQUEST",
        ErrorCode.BODY_TOO_LARGE: "INVALID_REQUEST",
    }
)
_PROBLEMS_SHOWN_MAX = 5
_MESSAGES: TypeAdapter[ClientMessage] = TypeAdapter(ClientMessage)


class RefusedMessageError(Exception):
    """A message that is none of the protocol's, and whose it was, as far as it can be told."""

    def __init__(self, error: ServeAppError, request_id: str | None) -> None:
        super().__init__(error, request_id)
        self.error = error
        self.request_id = request_id

    def __str__(self) -> str:
        return str(self.error)


def parse_message(value: object) -> ClientMessage:
    """The value as a message.

    Raises:
        InvalidPromptError: its prompt is empty, missing or no text.
        InvalidRequestError: anything else is wrong with it.
    """
    try:
        return _MESSAGES.validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        if any(detail["loc"][-1:] == ("prompt",) for detail in found):
            raise InvalidPromptError("the prompt must be a text that says something") from None
        # The first part of a place is the message's type, not a member.
        places = [
            f"{'.'.join(map(str, detail['loc'][1:])) or 'message'}: {detail['msg']}"
            for detail in found[:_PROBLEMS_SHOWN_MAX]
        ]
        raise InvalidRequestError("; ".join(places)) from None


def check_size(message: ClientMessage, size: int, size_max: int) -> None:
    """Refuse what is larger than a message may be, in bytes.

    Raises:
        InvalidPromptError: a prompt makes it so.
        BodyTooLargeError: it has none.
    """
    if size <= size_max:
        return
    if isinstance(message, InferenceMessage):
        raise InvalidPromptError(f"the prompt is too long; a message has at most {size_max} bytes")
    raise BodyTooLargeError(f"a message has at most {size_max} bytes")


def request_id_of(value: object) -> str | None:
    """The id that a message names, whatever else is wrong with it."""
    request_id = value.get("request_id") if isinstance(value, dict) else None
    is_id = isinstance(request_id, str) and 0 < len(request_id) <= SOCKET_REQUEST_ID_MAX
    return request_id if is_id else None


def piece_message(request_id: str | None, content: str, reason: FinishReason | None = None) -> Json:
    """A piece of an answer; the last one has a reason."""
    message: Json = {"type": "stream_chunk", "content": content}
    if reason is not None:
        message["finish_reason"] = reason
    return _named(message, request_id)


def end_message(
    request_id: str | None, usage: Usage, reason: FinishReason, resumed: Resumed | None = None
) -> Json:
    """The end of an answer; `resumed` where another host went on with it."""
    message: Json = {"type": "stream_end", "finish_reason": reason, "usage": _usage_view(usage)}
    if resumed is not None:
        message["resumed"] = resumed
    return _named(message, request_id)


def failure_message(request_id: str | None, usage: Usage, error: ServeAppError) -> Json:
    """The end of a request that failed."""
    return {**error_message(error, request_id), "usage": _usage_view(usage)}


def broken_piece(request_id: str | None) -> Json:
    """The last piece of an answer that breaks off."""
    return {**piece_message(request_id, ""), "finish_reason": "error"}


def error_message(error: ServeAppError, request_id: str | None) -> Json:
    """A refusal, under the protocol's code."""
    code = ErrorCode(error.code)
    body = {"code": CODES.get(code, code), "message": str(error)}
    return _named({"type": "error", "error": body}, request_id)


def _named(message: Json, request_id: str | None) -> Json:
    return message if request_id is None else {**message, "request_id": request_id}


def _usage_view(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "cached_tokens": usage.cached_tokens,
    }

"""The messages of the WebSocket protocol, `/v1/ws`: one JSON object per text frame.

Owns their shapes for both sides; `docs/websocket.md` tells the story. Invariant: what a client
sends is checked to the last member, what a server sends may grow members.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt

SOCKET_REQUEST_ID_MAX = 128
STOP_MAX = 16
DURATION_MS_MAX = 24 * 3600 * 1000  # a day: no answer is worth a longer wait

SocketFinishReason = Literal["stop", "length", "error"]
SocketEndReason = Literal["stop", "length", "error", "cancelled"]


def _says_something(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt


Prompt = Annotated[str, AfterValidator(_says_something)]
RequestId = Annotated[str, Field(min_length=1, max_length=SOCKET_REQUEST_ID_MAX)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Sent(BaseModel):
    """What a client sends: an unknown member is a mistake, and is refused as one."""

    model_config = ConfigDict(extra="forbid")


class _Answered(BaseModel):
    """What a server sends: unknown members are those of a newer server."""

    model_config = ConfigDict(extra="ignore")


class SocketInference(_Sent):
    """`request` of an inference message.

    Args:
        prompt: one user message, put under the model's chat template.
        model: an id of `/v1/models`; none: the session's, or the default one.
        session_id: the prompt follows the session's turns, and is kept there with its answer.
        timeout: milliseconds for all of it, waiting included.
    """

    prompt: Prompt
    model: Annotated[str, Field(max_length=256)] = ""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    stop: StopText | Annotated[tuple[StopText, ...], Field(max_length=STOP_MAX)] = ()
    stream: StrictBool = True
    session_id: Annotated[str, Field(max_length=128)] | None = None
    timeout: Annotated[StrictInt, Field(ge=1, le=DURATION_MS_MAX)] | None = None


class InferenceMessage(_Sent):
    """Ask for an answer. Without a `request_id` a socket has one request at a time."""

    type: Literal["inference"] = "inference"
    request_id: RequestId | None = None
    request: SocketInference


class CancelMessage(_Sent):
    """Stop a request; its `stream_end` tells what was used. One that has ended is left alone."""

    type: Literal["cancel"] = "cancel"
    request_id: RequestId | None = None


class AuthMessage(_Sent):
    """Say who speaks, where headers cannot be sent; answered by `auth_ok`."""

    type: Literal["auth"] = "auth"
    api_key: Annotated[str, Field(min_length=1, max_length=1024)]


class AuthOkMessage(_Answered):
    """The key is good."""

    type: Literal["auth_ok"] = "auth_ok"


class SocketUsage(_Answered):
    """Tokens, as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0


class ChunkMessage(_Answered):
    """A piece of the answer; `finish_reason` is on the last one alone."""

    type: Literal["stream_chunk"] = "stream_chunk"
    request_id: str | None = None
    content: str
    finish_reason: SocketFinishReason | None = None


class EndMessage(_Answered):
    """The answer is complete, or was cancelled.

    `resumed`: its host was lost and another went on, `exact` or `approximate`; None: neither.
    """

    type: Literal["stream_end"] = "stream_end"
    request_id: str | None = None
    finish_reason: SocketEndReason | None = None
    usage: SocketUsage
    resumed: str | None = None


class SocketError(_Answered):
    """What went wrong: a stable code, and words for people."""

    code: str
    message: str


class ErrorMessage(_Answered):
    """The request has failed; without a `request_id`, it may be the message or the socket."""

    type: Literal["error"] = "error"
    request_id: str | None = None
    error: SocketError
    usage: SocketUsage | None = None


ClientMessage = Annotated[
    InferenceMessage | CancelMessage | AuthMessage, Field(discriminator="type")
]
ServerMessage = Annotated[
    AuthOkMessage | ChunkMessage | EndMessage | ErrorMessage, Field(discriminator="type")
]

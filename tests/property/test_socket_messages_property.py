"""Socket messages: any JSON is a message or a refusal; whatever goes out is of the protocol."""

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from inferpipe.wire import AuthMessage, CancelMessage, InferenceMessage, ServerMessage
from serve_app.core import errors
from serve_app.core.errors import InvalidPromptError, InvalidRequestError, ServeAppError
from serve_app.core.inference import FinishReason, Resumed, Usage
from serve_app.ingress.socket_messages import (
    broken_piece,
    end_message,
    error_message,
    failure_message,
    parse_message,
    piece_message,
    request_id_of,
)

SERVER: TypeAdapter[ServerMessage] = TypeAdapter(ServerMessage)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
NAMES = st.sampled_from(
    ["prompt", "model", "max_tokens", "temperature", "top_p", "stop", "stream", "session_id",
     "timeout", "other"]
)  # fmt: skip
NEAR = st.fixed_dictionaries(
    {"type": st.sampled_from(["inference", "cancel", "auth", "other"])},
    optional={
        "request_id": SCALARS,
        "api_key": SCALARS,
        "request": JSON | st.dictionaries(NAMES, JSON),
    },
)
IDS = st.none() | st.text(min_size=1, max_size=128)
USAGES = st.builds(Usage, st.integers(0), st.integers(0), st.integers(0))
ERRORS = [
    cls("what happened")
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, ServeAppError)
]


@given(JSON | NEAR)
def test_any_json_is_a_message_or_a_refusal(value: object) -> None:
    request_id_of(value)
    message: object = None
    with suppress(InvalidPromptError, InvalidRequestError):
        message = parse_message(value)
    assert message is None or isinstance(message, InferenceMessage | CancelMessage | AuthMessage)


@given(IDS, st.text(), USAGES, st.sampled_from(FinishReason), st.sampled_from([None, *Resumed]))
def test_every_message_of_an_answer_is_of_the_protocol(
    request_id: str | None,
    content: str,
    usage: Usage,
    reason: FinishReason,
    resumed: Resumed | None,
) -> None:
    shown = None if reason is FinishReason.CANCELLED else reason
    for message in (
        piece_message(request_id, content, shown),
        broken_piece(request_id),
        end_message(request_id, usage, reason, resumed),
    ):
        read = SERVER.validate_python(message)
        assert getattr(read, "request_id", None) == request_id


@given(IDS, USAGES, st.sampled_from(ERRORS))
def test_every_error_is_told_in_the_protocol(
    request_id: str | None, usage: Usage, error: ServeAppError
) -> None:
    for message in (error_message(error, request_id), failure_message(request_id, usage, error)):
        read = SERVER.validate_python(message)
        assert read.type == "error"
        assert read.error.message == str(error)

"""The examples of docs/websocket.md are messages of the protocol."""

import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from inferpipe.wire import ClientMessage, ServerMessage
from serve_app.core.errors import ErrorCode
from serve_app.ingress.socket_messages import CODES
from serve_app.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "websocket.md").read_text()
EXAMPLES = re.findall(r"```json (client|server)\n(.*?)\n```", PAGE, re.DOTALL)
MODELS: dict[str, TypeAdapter[object]] = {
    "client": TypeAdapter(ClientMessage),
    "server": TypeAdapter(ServerMessage),
}


@pytest.mark.parametrize(("side", "text"), EXAMPLES)
def test_an_example_is_a_message_of_its_side(side: str, text: str) -> None:
    message = json.loads(text)
    assert set(message) <= set(MODELS[side].validate_python(message).model_dump())  # type: ignore[attr-defined]


def test_every_kind_of_message_has_an_example() -> None:
    shown = {json.loads(text)["type"] for _, text in EXAMPLES}
    assert shown == {
        "auth",
        "auth_ok",
        "inference",
        "cancel",
        "stream_chunk",
        "stream_end",
        "error",
    }


def test_codes_and_settings_of_the_page_exist() -> None:
    codes = set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE, re.MULTILINE))
    ours = {code.value for code in ErrorCode} | set(CODES.values())
    assert codes <= ours
    names = set(re.findall(r"`INFERPIPE_([A-Z_]+)`", PAGE))
    assert names <= {name.upper() for name in Settings.model_fields}

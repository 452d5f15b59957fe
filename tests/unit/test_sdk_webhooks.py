"""The receiver's side: what is accepted, and that whatever else comes is refused in words."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import inferpipe
from inferpipe import InvalidArgumentError, WebhookVerificationError
from inferpipe.webhooks import TOLERANCE_S, WebhookEvent, sign, verify
from serve_app.core.webhooks import signed_headers

PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
NOW = 1_763_700_000.0
SECRET, OTHER = (f"whsec_{base64.b64encode(bytes([n]) * 32).decode()}" for n in (1, 2))
BODY = json.dumps(
    {
        "id": "evt_1",
        "type": "workflow.completed",
        "createdAt": "2025-11-21T04:40:00.123Z",
        "data": {"executionId": "exe_1", "output": "ü"},
    }
).encode()


def sent(secret: str = SECRET, at: float = NOW, body: bytes = BODY) -> dict[str, str]:
    """What our server sends; the SDK has no part in it."""
    return signed_headers("evt_1", body, [secret], int(at * 1000))


def refused(payload: Any = BODY, headers: Any = None, secret: Any = SECRET, **options: Any) -> str:
    with pytest.raises(WebhookVerificationError) as error:
        verify(payload, sent() if headers is None else headers, secret, now=NOW, **options)
    return str(error.value)


@pytest.mark.parametrize("scheme", ["standard", "body"])
@pytest.mark.parametrize("kind", [bytes, bytearray, str])
def test_what_the_server_sends_is_accepted(scheme: Any, kind: Callable[..., Any]) -> None:
    payload = BODY.decode() if kind is str else kind(BODY)
    event = verify(payload, sent(), SECRET, scheme=scheme, now=NOW)
    assert isinstance(event, WebhookEvent)
    assert (event.id, event.type) == ("evt_1", "workflow.completed")
    assert event.data["output"] == "ü"


def test_header_names_come_in_any_case_and_type() -> None:
    headers = httpx.Headers({name.title(): value for name, value in sent().items()})
    verify(BODY, headers, SECRET, now=NOW)
    verify(BODY, {name.upper(): value for name, value in sent().items()}, SECRET, now=NOW)


@pytest.mark.parametrize("scheme", ["standard", "body"])
def test_a_changed_byte_or_another_secret_is_refused(scheme: str) -> None:
    for index in range(len(BODY)):
        changed = BODY[:index] + bytes([BODY[index] ^ 1]) + BODY[index + 1 :]
        assert "fits" in (why := refused(changed, scheme=scheme)) or "fit" in why
    refused(BODY + b" ", scheme=scheme)
    refused(b"", scheme=scheme)
    refused(secret=OTHER, scheme=scheme)


@pytest.mark.parametrize("change", [-TOLERANCE_S - 1, TOLERANCE_S + 1, -1e9])
def test_a_time_too_far_from_ours_is_refused(change: float) -> None:
    refused(headers=sent(at=NOW + change))
    verify(BODY, sent(at=NOW + change), SECRET, now=NOW, tolerance_s=1e10)


@pytest.mark.parametrize("change", [-TOLERANCE_S, 0, TOLERANCE_S])
def test_a_time_within_the_tolerance_is_accepted(change: float) -> None:
    verify(BODY, sent(at=NOW + change), SECRET, now=NOW)


def test_without_now_this_machine_s_clock_counts() -> None:
    with pytest.raises(WebhookVerificationError, match="old"):
        verify(BODY, sent(), SECRET)


def test_one_of_several_secrets_and_of_several_signatures_suffices() -> None:
    verify(BODY, sent(OTHER), [SECRET, OTHER], now=NOW)
    rotating = signed_headers("evt_1", BODY, [OTHER, SECRET], int(NOW * 1000))
    verify(BODY, rotating, SECRET, now=NOW)
    verify(BODY, rotating, OTHER, now=NOW)
    verify(BODY, rotating, SECRET, scheme="body", now=NOW)


def test_a_signed_id_that_is_not_the_body_s_is_refused() -> None:
    headers = sign(BODY, SECRET, event_id="evt_2", at=NOW)
    assert "webhook-id" in refused(headers=headers)


def test_without_the_standard_headers_the_body_s_signature_is_not_enough() -> None:
    """Else whoever recorded a delivery could strip them and send it for ever."""
    alone = {"x-inferpipe-signature": sent()["x-inferpipe-signature"]}
    assert "missing" in refused(headers=alone)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"webhook-id": ""},
        {**sent(), "webhook-id": "evt_ü"},
        {**sent(), "webhook-timestamp": "now"},
        {**sent(), "webhook-timestamp": "-1"},
        {**sent(), "webhook-timestamp": "1e9"},
        {**sent(), "webhook-timestamp": "٣"},
        {**sent(), "webhook-timestamp": "9" * 5000},
        {**sent(), "webhook-timestamp": "1763700000.0"},
        {**sent(), "webhook-signature": "v1"},
        {**sent(), "webhook-signature": "v1,,"},
        {**sent(), "webhook-signature": ",,,"},
        {**sent(), "webhook-signature": " "},
        {**sent(), "webhook-signature": "v1,!!!"},
        {**sent(), "webhook-signature": "v1,YWJj"},
        {**sent(), "webhook-signature": "v2," + sent()["webhook-signature"][3:]},
        {**sent(), "webhook-signature": sent()["webhook-signature"][3:]},
        {**sent(), "webhook-signature": "v1,x " * 33 + sent()["webhook-signature"]},
        {**sent(), "webhook-signature": None},
        {**sent(), "webhook-signature": b"v1,x"},
        {None: 1, 2: object()},
    ],
)
def test_hostile_headers_are_refused_in_words(headers: dict[Any, Any]) -> None:
    assert refused(headers=headers)


@pytest.mark.parametrize("value", ["", "zz", "ab", "abc", "0x12", "ü", "a" * 64, "00" * 10_000])
def test_a_hostile_body_signature_is_refused_in_words(value: str) -> None:
    assert refused(headers={"x-inferpipe-signature": value}, scheme="body")


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b"", b"null", b"[]", b"{}", b'{"id": 1}', b"[" * 200_000, b"NaN"]
)
def test_what_is_signed_but_no_event_is_refused(body: bytes) -> None:
    headers = signed_headers("evt_1", body, [SECRET], int(NOW * 1000))
    assert "no event" in refused(body, headers)


@pytest.mark.parametrize("payload", ["\ud800", "x\udfff"])
def test_a_text_that_is_no_utf_8_is_refused(payload: str) -> None:
    assert refused(payload)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!", SECRET[6:], [], "abc"])
def test_a_secret_that_is_none_is_the_caller_s_mistake(secret: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        verify(BODY, sent(), secret, now=NOW)


@given(
    st.binary(max_size=200) | st.text(max_size=100),
    st.dictionaries(
        st.sampled_from([*sent()]) | st.text(max_size=20), st.text(max_size=80), max_size=6
    ),
    st.sampled_from(["standard", "body"]),
)
def test_whatever_comes_is_refused_and_nothing_else_is_raised(
    payload: Any, headers: dict[str, str], scheme: str
) -> None:
    refused(payload, headers, scheme=scheme)


def test_the_error_is_one_of_the_package_s() -> None:
    assert issubclass(WebhookVerificationError, inferpipe.InferPipeError)


def example(word: str) -> ModuleType:
    """The page's example for a framework, as a module."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (code,) = (block for block in blocks if f"from {word} import" in block)
    module = ModuleType(f"receiver_{word}")
    exec(compile(code, f"docs/webhooks.md ({word})", "exec"), module.__dict__)
    return module


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr("inferpipe.webhooks.time.time", lambda: NOW)
    return SECRET


async def test_the_fastapi_example_takes_ours_once_and_refuses_others(
    secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = httpx.ASGITransport(example("fastapi").app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        for _ in range(2):
            taken = await http.post("/webhooks/inferpipe", content=BODY, headers=sent())
            assert taken.status_code == 200
        other = await http.post("/webhooks/inferpipe", content=BODY, headers=sent(OTHER))
    assert other.status_code == 400
    assert capsys.readouterr().out == "workflow.completed exe_1 ü\n"


def test_the_flask_example_takes_ours_once_and_refuses_others(
    secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flask")
    http = example("flask").app.test_client()
    for _ in range(2):
        assert http.post("/webhooks/inferpipe", data=BODY, headers=sent()).status_code == 200
    other = http.post("/webhooks/inferpipe", data=BODY, headers=sent(OTHER))
    assert other.status_code == 400
    assert capsys.readouterr().out == "workflow.completed exe_1 ü\n"

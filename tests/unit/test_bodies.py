"""Request bodies: bounds at the limit, below and above it, and refusals in words."""

from collections.abc import Iterable

import pytest
from starlette.requests import Request

from inferpipe.wire import ExecuteRequest
from serve_app.core.errors import BodyTooLargeError, InvalidRequestError, MalformedJsonError
from serve_app.ingress.bodies import parse_json, read_body, validate

SIZE_MAX = 100
DEPTH_MAX = 64


def a_request(parts: Iterable[bytes], **headers: str) -> Request:
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    waiting = iter(messages)

    async def receive() -> dict[str, object]:
        return next(waiting)

    raw = [
        (name.replace("_", "-").encode(), value.encode("latin-1"))
        for name, value in headers.items()
    ]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


@pytest.mark.parametrize("size", [0, SIZE_MAX - 1, SIZE_MAX])
async def test_a_body_within_the_limit_is_read_whole(size: int) -> None:
    body = b"x" * size
    assert await read_body(a_request([body], content_length=str(size)), SIZE_MAX) == body
    assert await read_body(a_request([body[:40], body[40:]]), SIZE_MAX) == body


async def test_a_declared_size_over_the_limit_is_refused_unread() -> None:
    request = a_request([], content_length=str(SIZE_MAX + 1))
    with pytest.raises(BodyTooLargeError, match="the body has 101 bytes; at most 100"):
        await read_body(request, SIZE_MAX)


@pytest.mark.parametrize("declared", [None, "0", "100", "many", "-1", "²"])
async def test_a_size_that_was_not_declared_is_refused_where_it_shows(declared: str | None) -> None:
    headers = {} if declared is None else {"content_length": declared}
    request = a_request([b"x" * SIZE_MAX, b"x", b"never read"], **headers)
    with pytest.raises(BodyTooLargeError, match="larger than 100 bytes"):
        await read_body(request, SIZE_MAX)
    assert (await request.receive())["body"] == b"never read"


def nested(depth: int, opening: str, middle: str, closing: str) -> bytes:
    return (opening * depth + middle + closing * depth).encode()


SHAPES = {
    "empty lists": ("[", "", "]"),
    "lists": ("[", "1", "]"),
    "objects": ('{"a":', "null", "}"),
    "beside others": ('{"b":1,"a":', "null", ',"c":2}'),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [DEPTH_MAX - 1, DEPTH_MAX])
def test_json_as_deep_as_the_limit_is_taken(shape: str, depth: int) -> None:
    parse_json(nested(depth, *SHAPES[shape]), DEPTH_MAX)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [DEPTH_MAX + 1, 200, 100_000])
def test_json_deeper_than_the_limit_is_refused(shape: str, depth: int) -> None:
    with pytest.raises(MalformedJsonError):
        parse_json(nested(depth, *SHAPES[shape]), DEPTH_MAX)


def test_many_brackets_are_not_depth() -> None:
    value = parse_json(b"[" + b",".join([b'{"a": [1]}'] * 500) + b"]", DEPTH_MAX)
    assert value == [{"a": [1]}] * 500
    assert parse_json(b'"' + b"[" * 500 + b'"', DEPTH_MAX) == "[" * 500


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nul", b'{"a": NaN}', b"[Infinity]", b'"\xff"', rb'"\ud800"', b"{'a': 1}", b"1 2"],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedJsonError, match="the body is no JSON"):
        parse_json(body, DEPTH_MAX)


@pytest.mark.parametrize("body", [b"1", b"null", b'"text"', b"[]", b"{}"])
def test_any_json_value_is_taken(body: bytes) -> None:
    parse_json(body, DEPTH_MAX)


def test_a_body_becomes_its_wire_model() -> None:
    value = {"workflowId": "test-echo", "input": {"a": 1}, "timeout": 1000, "userId": "u1"}
    wish = validate(ExecuteRequest, value)
    assert (wish.workflow_id, wish.input, wish.timeout) == ("test-echo", {"a": 1}, 1000)


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ([], {("body",)}),
        ({}, {("body", "workflowId"), ("body", "input")}),
        ({"workflowId": "w", "input": {}, "timeout": 0}, {("body", "timeout")}),
        ({"workflowId": "w", "input": {}, "timeout": "9"}, {("body", "timeout")}),
        ({"workflowId": "w", "input": {}, "extra": 1}, {("body", "extra")}),
        (
            {"workflowId": "w", "input": {}, "retryConfig": {"attempts": -1}},
            {("body", "retryConfig", "attempts")},
        ),
    ],
)
def test_a_wrong_shape_names_every_place(value: object, places: set[tuple[str, ...]]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(ExecuteRequest, value)
    assert {problem.loc for problem in refused.value.problems} == places

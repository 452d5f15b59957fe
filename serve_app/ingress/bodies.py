"""Request bodies: read with a bound, parsed once, refused in words.

Owns the size and depth limits of JSON bodies and their validation against the wire models.
"""

from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from serve_app.core.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedJsonError,
    Problem,
)
from serve_app.settings import Settings

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, size_max: int) -> bytes:
    """The body.

    Raises:
        BodyTooLargeError: as soon as it is known to be larger than `size_max` bytes.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > size_max:
        raise BodyTooLargeError(f"the body has {declared} bytes; at most {size_max} are taken")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > size_max:
            raise BodyTooLargeError(f"the body is larger than {size_max} bytes")
        parts.append(part)
    return b"".join(parts)


async def read_json(request: Request, settings: Settings, size_max: int | None = None) -> object:
    """The value of a JSON body, within the settings' bounds or `size_max` bytes.

    Raises as the two functions beside it.
    """
    body = await read_body(request, size_max or settings.body_max_bytes)
    return parse_json(body, settings.json_depth_max)


def parse_json(body: bytes, depth_max: int) -> object:
    """The value of a JSON body.

    Raises:
        MalformedJsonError: no JSON (bad UTF-8, lone surrogates and NaN included), or too deep.
    """
    try:
        value: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedJsonError(f"the body is no JSON: {error}") from error
    # Counting brackets is cheap and an upper bound, so the walk is for the rare deep body alone.
    if body.count(b"[") + body.count(b"{") > depth_max and _is_deeper(value, depth_max):
        raise MalformedJsonError(f"the body nests deeper than {depth_max} levels")
    return value


def validate(model: type[Model], value: object) -> Model:
    """The value as a wire model.

    Raises:
        InvalidRequestError: with every problem and its place.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = [
            Problem(("body", *detail["loc"]), detail["msg"])
            for detail in error.errors(include_url=False, include_input=False)
        ]
        raise InvalidRequestError("the body has the wrong shape", problems) from error


def _is_deeper(value: object, depth_max: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth_max):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True

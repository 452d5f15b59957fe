"""What the answers of all routes share: the documented errors, and JSON bodies."""

import orjson
from starlette.responses import Response

from inferpipe import wire

ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": wire.Problem, "description": text}
    for status, text in {
        400: "Not JSON, or not a cursor",
        401: "No key, or an unknown one",
        403: "The key may not do this",
        404: "No such workflow or execution in this workspace",
        409: "It has ended, or the Idempotency-Key came with another body",
        413: "The body is too large",
        422: "The body or the input has the wrong shape",
        429: "The key's limit is used up; see Retry-After",
        503: "A queue is full, or the store is out of reach; see Retry-After",
    }.items()
}


def json_response(
    value: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """An answer with a JSON body."""
    return Response(orjson.dumps(value), status, headers, "application/json")

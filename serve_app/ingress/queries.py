"""Members of a query: read with their bounds, refused in words.

Owns nothing else. A query is text that a stranger wrote: what looks like a number may be a
thousand digits long, or in another script's digits.
"""

from starlette.requests import Request

from serve_app.core.errors import InvalidRequestError, Problem

_DIGITS_MAX = 15  # exact in JSON, and cheap to read


def whole_number(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A number of the query, from `low` to `high`.

    Raises:
        InvalidRequestError: it is none, or out of bounds.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX
    if not (is_number and low <= int(text) <= high):
        wanted = f"a number from {low} to {high}"
        raise InvalidRequestError(f"{name} is {wanted}", [Problem(("query", name), wanted)])
    return int(text)

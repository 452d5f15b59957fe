"""One call of the API as a value, and what such values are made with.

Owns `Operation`, where the next page of a list begins, and the builders that all operations share.
Does no I/O. Invariant: an operation holds no state, so it can be performed any number of times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel

from inferpipe import _calls as calls
from inferpipe._calls import Answer, Call
from inferpipe.errors import InferPipeProtocolError

T_co = TypeVar("T_co", covariant=True)
ModelT = TypeVar("ModelT", bound=BaseModel)

JSON_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Operation(Generic[T_co]):
    """One call, and what its answer means."""

    call: Call
    read: Callable[[Answer], T_co]


class Page(Protocol[T_co]):
    """A part of a list, and where the next part begins; None at the end."""

    @property
    def items(self) -> Sequence[T_co]:
        """In the server's order."""
        ...

    @property
    def next_cursor(self) -> str | None:
        """For the next call."""
        ...


def next_cursor(page: Page[object], cursor: str | None) -> str | None:
    """Return where the next page begins; None where this is the last.

    Raises:
        InferPipeProtocolError: it begins where this one did, and would without end.
    """
    if page.next_cursor is not None and page.next_cursor == cursor:
        raise InferPipeProtocolError(f"the page after {cursor!r} names itself as the next one")
    return page.next_cursor


def reading(call: Call, model: type[ModelT]) -> Operation[ModelT]:
    """Return the operation whose answer is a model."""

    def read(answer: Answer) -> ModelT:
        return calls.read_model(answer, model)

    return Operation(call, read)


def nothing(_: Answer) -> None:
    """Read an answer that says nothing."""
    return


def get(path: str, query: Mapping[str, object] | None = None) -> Call:
    """Build a GET."""
    return Call("GET", with_query(path, query or {}))


def post(path: str, content: bytes | None = None) -> Call:
    """Build a POST; the client adds its `Idempotency-Key`."""
    return Call("POST", path, {} if content is None else JSON_HEADERS, content)


def delete(path: str) -> Operation[None]:
    """Return the operation that deletes what the path names."""
    return Operation(Call("DELETE", path), nothing)


def with_query(path: str, query: Mapping[str, object]) -> str:
    """Return the path with those members of the query that are given."""
    members = given(query)
    return f"{path}?{urlencode(members)}" if members else path


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members that are not None."""
    return {name: value for name, value in values.items() if value is not None}

"""Commands leave as RESP, and a connection goes back clean or closed."""

import asyncio

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from serve_app.adapters.redis_batch import Command, exchange, packed


class Line:
    """A connection and its pool at once; answers what it was given."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.sent = b""
        self.is_closed = self.is_back = False

    async def get_connection(self) -> "Line":
        return self

    async def release(self, connection: "Line") -> None:
        self.is_back = connection is self

    async def send_packed_command(self, data: bytes) -> None:
        self.sent = data

    async def read_response(self, *, timeout: float) -> object:  # noqa: ASYNC109 - redis-py's
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def disconnect(self, *, nowait: bool) -> None:
        self.is_closed = nowait


COMMANDS: list[Command] = [
    ("HGET", "ip:{1}:s:exe", "seq"),
    ("FCALL", "f", 1, "k", b"\x00\r\n\xff", "ü", 12345678901234, ""),
]


def test_commands_are_packed_as_redis_py_does() -> None:
    own = Connection(host="127.0.0.1")
    assert packed(COMMANDS) == b"".join(own.pack_commands(COMMANDS))


async def test_answers_come_in_order_with_errors_in_their_places() -> None:
    refusal = ResponseError("no")
    line = Line([b"a", b"1"], refusal)
    got = await exchange(line, {"HGET": dict.fromkeys}, COMMANDS, 1.0)
    assert got == [{b"a": None, b"1": None}, refusal]
    assert line.is_back
    assert not line.is_closed


async def test_a_lost_connection_is_closed_and_goes_back() -> None:
    line = Line(b"1", RedisConnectionError("gone"))
    with pytest.raises(RedisConnectionError):
        await exchange(line, {}, COMMANDS, 1.0)
    assert line.is_closed
    assert line.is_back


async def test_answers_that_do_not_come_close_the_connection() -> None:
    line = Line(b"1")
    with pytest.raises(TimeoutError):
        await exchange(line, {}, COMMANDS, 0.01)
    assert line.is_closed
    assert line.is_back

"""Many commands in one write, and their answers in order.

Owns what goes over a connection for one batch. redis-py's pipeline does the same and costs more: it
packs word by word and arms a timer for each answer. Invariant: a connection goes back to its pool
with no answer left in it, or closed.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.exceptions import ResponseError

Command = tuple[str | bytes | int, ...]
# By the command's name: what redis-py makes of an answer, such as a map of a list.
Callbacks = Mapping[Any, Callable[..., Any]]


async def exchange(
    pool: Any, callbacks: Callbacks, commands: Sequence[Command], timeout_s: float
) -> list[Any]:
    """Each command's answer, or the error the server gave in its place.

    `pool` is a redis-py `ConnectionPool`, whose methods have no types.

    Raises:
        redis.ConnectionError, OSError: the connection was lost, or not all answers came in time;
            any of the commands may have been applied.
    """
    connection = await pool.get_connection()
    try:
        async with asyncio.timeout(timeout_s):
            await connection.send_packed_command(packed(commands))
            return [await _answer(connection, callbacks.get(str(c[0]))) for c in commands]
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)


def packed(commands: Sequence[Command]) -> bytes:
    """The commands as RESP arrays of bulk strings (Redis serialization protocol specification)."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for word in command:
            data = word if isinstance(word, bytes) else str(word).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


async def _answer(connection: Any, callback: Callable[[Any], Any] | None) -> Any:
    try:
        # Without end: the timer of the whole batch is armed already.
        answer = await connection.read_response(timeout=math.inf)
    except ResponseError as error:
        return error
    return answer if callback is None else callback(answer)

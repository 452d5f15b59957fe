"""One call to the store from where no event loop turns: a constructor, a command's thread.

Owns nothing that lasts: it connects, asks, and disconnects. Never use it on an event loop.
"""

from typing import Any

from redis import ConnectionPool, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError

from serve_app.adapters.redis_nodes import ANSWER_TIMEOUT_S, RedisOptions

_REDIRECTS_MAX = 5  # a cluster in good order needs one


def call_blocking(options: RedisOptions, command: str, key: str, *args: str | bytes | int) -> Any:
    """The answer of the server that has the key.

    Raises:
        RedisError: no server answers, or the one that does refuses.
    """
    why: Exception = RedisConnectionError("no node of the store is known")
    for url in options.urls:
        try:
            return _follow(url, options, (command, key, *args))
        except RedisConnectionError as error:
            why = error
    raise why


def _follow(url: str, options: RedisOptions, command: tuple[str | bytes | int, ...]) -> Any:
    pool = ConnectionPool.from_url(
        url,
        **options.connection,
        socket_timeout=ANSWER_TIMEOUT_S,
        socket_connect_timeout=ANSWER_TIMEOUT_S,
    )
    for _ in range(_REDIRECTS_MAX):
        try:
            with Redis(connection_pool=pool) as client:
                return client.execute_command(*command)
        except MovedError as moved:
            place = {"port": moved.port, **({"host": moved.host} if moved.host else {})}
            pool.connection_kwargs.update(place)
        finally:
            pool.disconnect()
    raise RedisConnectionError(f"more than {_REDIRECTS_MAX} redirections for {command[1]!r}")

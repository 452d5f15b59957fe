"""Which server has which slot: one server for all, or the primaries of a Redis Cluster.

Owns the slot map, the addresses it was learned from, and the clients. Whether it is a cluster is
asked of the server itself (CLUSTER SLOTS), so no setting can be wrong about it. Invariant: the map
is a hint; the server that gets a call decides, and its MOVED is believed over the map.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from serve_app.adapters.redis_batch import Callbacks, Command, exchange

logger = logging.getLogger(__name__)

SLOTS = 16384  # of every Redis Cluster, by its specification
ANSWER_TIMEOUT_S = 5.0  # of a server; a stuck one is treated as lost
MAP_TIMEOUT_S = 1.0  # for the slot map, so that a silent node does not hide those that know
_NOT_A_CLUSTER = "cluster support disabled"

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """How to reach the store.

    Args:
        urls: one server, or some nodes of a cluster, from any of which the others are learned.
        connection: what every connection takes beside the URL, by redis-py's names: user,
            password, certificates.
        ack_replicas: how many replicas must have a write before it is acknowledged.
    """

    urls: tuple[str, ...]
    connection: dict[str, Any] = field(default_factory=dict)
    ack_replicas: int = 0


@lru_cache(maxsize=4096)
def _slot_of_tag(tag: str) -> int:
    return int(key_slot(tag.encode()))


def slot_of(key: str) -> int:
    """The slot of one of our keys, each of which has its hash tag in braces."""
    return _slot_of_tag(key[key.index("{") + 1 : key.index("}")])


class RedisNodes:
    """The servers of the store, as this process knows them."""

    def __init__(self, options: RedisOptions) -> None:
        self.options = options
        self.version = 0
        self._seeds = [_connection_options(url, options) for url in options.urls]
        self._owners: list[Address | None] | None = None
        self._single: Address | None = None
        self._pools: dict[Address, ConnectionPool] = {}
        self._is_refreshing = asyncio.Lock()
        self._watchers: set[asyncio.Event] = set()
        self._callbacks: Callbacks | None = None  # the same for all of redis-py's clients

    def owner(self, key: str) -> Address | None:
        """Who has the slot of a key; None while that is not known."""
        if self._owners is None:
            return self._single
        return self._owners[slot_of(key)]

    def addresses(self) -> frozenset[Address]:
        """All servers that have slots."""
        if self._owners is None:
            return frozenset() if self._single is None else frozenset((self._single,))
        return frozenset(owner for owner in self._owners if owner is not None)

    def client(self, address: Address) -> Redis:
        """A client of one server."""
        return Redis(connection_pool=self._pool(address))

    async def exchange(self, address: Address, commands: Sequence[Command]) -> list[Any]:
        """See `redis_batch.exchange`."""
        pool = self._pool(address)
        if self._callbacks is None:
            self._callbacks = Redis(connection_pool=pool).response_callbacks
        return await exchange(pool, self._callbacks, commands, ANSWER_TIMEOUT_S)

    def subscriber(self, address: Address) -> AbstractConnection:
        """A new connection for subscriptions; the caller closes it.

        RESP2, where a pushed message is an answer like any other, so that one read gets all.
        """
        pool: Any = ConnectionPool(**self._place(address), protocol=2)
        connection: AbstractConnection = pool.make_connection()
        return connection

    def move(self, key: str, address: Address) -> None:
        """Believe what a server said of the slot of a key."""
        if self._owners is None:
            self._owners = [None] * SLOTS
        self._owners[slot_of(key)] = address
        self._tell()

    @contextmanager
    def watched(self, changed: asyncio.Event) -> Iterator[None]:
        """Set an event whenever a slot moved; whoever waits on it clears it."""
        self._watchers.add(changed)
        try:
            yield
        finally:
            self._watchers.discard(changed)

    async def refresh(self, known: int) -> None:
        """Learn the map again, unless somebody did since `version` was `known`.

        Raises:
            RedisConnectionError: no node answers.
            AuthenticationError: the store does not know us.
        """
        async with self._is_refreshing:
            if self.version != known:
                return
            why: Exception = RedisConnectionError("no node of the store is known")
            candidates = tuple(self._candidates())
            # With nobody else to ask there is nothing to hurry for: a process that starts beside an
            # engine may stand still for a second by itself.
            timeout_s = MAP_TIMEOUT_S if len(candidates) > 1 else ANSWER_TIMEOUT_S
            for address in candidates:
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._learn(address)
                except AuthenticationError:
                    raise
                except (RedisError, OSError, TimeoutError) as error:
                    why = error
                else:
                    return
            raise RedisConnectionError(f"no node of the store answers: {why}") from why

    async def close(self) -> None:
        """Disconnect from all."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            await pool.disconnect()

    def _candidates(self) -> Iterable[Address]:
        seeds = [(str(seed["host"]), int(seed["port"])) for seed in self._seeds]
        return dict.fromkeys((*sorted(self.addresses()), *seeds))

    async def _learn(self, address: Address) -> None:
        client: Any = self.client(address)
        try:
            rows = await client.execute_command("CLUSTER SLOTS")
        except ResponseError as error:
            if _NOT_A_CLUSTER not in str(error):
                raise
            rows = None
        self.version += 1
        if rows is None:
            self._single, self._owners = address, None
            return
        owners: list[Address | None] = [None] * SLOTS
        for first, last, (host, port, *_), *_ in rows:
            # An empty host means the one that was asked.
            owner = (host.decode() or address[0], int(port))
            owners[int(first) : int(last) + 1] = [owner] * (int(last) + 1 - int(first))
        is_news = owners != self._owners
        self._owners = owners
        if is_news:
            logger.info("the store has %d primaries", len(self.addresses()))
            self._tell()
            await self._forget_the_gone()

    async def _forget_the_gone(self) -> None:
        kept = {*self.addresses(), *self._candidates()}
        for address in self._pools.keys() - kept:
            await self._pools.pop(address).disconnect()

    def _tell(self) -> None:
        for changed in self._watchers:
            changed.set()

    def _pool(self, address: Address) -> ConnectionPool:
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = ConnectionPool(**self._place(address))
        return pool

    def _place(self, address: Address) -> dict[str, Any]:
        """What a connection takes; all nodes of a cluster share scheme, user and certificates."""
        host, port = address
        return {**self._seeds[0], "host": host, "port": port}


def _connection_options(url: str, options: RedisOptions) -> dict[str, Any]:
    return {
        "host": "localhost",
        "port": 6379,
        **parse_url(url),
        **options.connection,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "socket_connect_timeout": ANSWER_TIMEOUT_S,
        "socket_keepalive": True,
        # Ours know which calls may be sent again; redis-py does not.
        "retry": Retry(NoBackoff(), 0),
    }

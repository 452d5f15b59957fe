"""Sharded pub/sub over all servers: each channel is heard at the server that has its slot.

Owns one connection to each server that has a channel, and moves channels when slots move or a
server dies. redis-py's own subscription is not used: it sends all channels of a connection in one
SSUBSCRIBE, which a cluster refuses when they are of several slots. Invariant: when channels were
out of hearing, `None` comes once they are heard again, and before any later message of theirs.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from serve_app.adapters.redis_nodes import Address, RedisNodes
from serve_app.core.errors import StoreUnavailableError
from serve_app.ports import Clock

logger = logging.getLogger(__name__)

MESSAGES_MAX = 1024  # read and not yet taken; beyond it a connection is not read, and backs up
QUIET_S = 5.0  # then a server is asked whether it is still there; twice so long and it is lost
ANSWER_TIMEOUT_S = 5.0  # for all answers to a subscribing
HEARD_WITHIN_S = 10.0  # at the start; as long as a call waits for a server that starts again
_RETRY_DELAY_S = 0.2

Message = tuple[str, bytes]
_LOST = (RedisError, OSError, asyncio.IncompleteReadError, TimeoutError)


class RedisSubscription:
    """A set of channels, for the life of a process."""

    def __init__(self, nodes: RedisNodes, channels: Sequence[str], clock: Clock) -> None:
        self._nodes = nodes
        self._channels = frozenset(channels)
        self._clock = clock

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Message | None]]:
        """Messages from the moment the context is entered, when every channel is subscribed to.

        Raises:
            StoreUnavailableError: a server stayed out of reach, or does not know us.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue(MESSAGES_MAX)
        hearing = _Hearing(self._nodes, self._channels, messages)
        try:
            await self._settle_first(hearing)
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(hearing.keep(self._clock, group))
                try:
                    yield _taken(messages)
                finally:
                    keeper.cancel()
                    hearing.stop()
        finally:
            await hearing.close()

    async def _settle_first(self, hearing: "_Hearing") -> None:
        """A process that starts while its store does must wait like any other, and not end."""
        give_up_s = self._clock.monotonic_s() + HEARD_WITHIN_S
        while True:
            try:
                return await hearing.settle()
            except _LOST as error:
                is_refused = isinstance(error, AuthenticationError)
                if is_refused or self._clock.monotonic_s() > give_up_s:
                    raise StoreUnavailableError(f"the store cannot be heard: {error}") from error
            await self._clock.sleep(_RETRY_DELAY_S)


async def _taken(messages: "asyncio.Queue[Message | None]") -> AsyncIterator[Message | None]:
    while True:
        yield await messages.get()


@dataclass(slots=True)
class _Line:
    """One connection, what is subscribed to on it, and who reads it until it is lost."""

    connection: AbstractConnection
    channels: set[str]
    reader: "asyncio.Task[None] | None" = None

    @property
    def is_lost(self) -> bool:
        return self.reader is not None and self.reader.done()

    async def close(self) -> None:
        if self.reader is not None:
            self.reader.cancel()
        await self.connection.disconnect(nowait=True)


class _Hearing:
    """The lines of one listening."""

    def __init__(
        self,
        nodes: RedisNodes,
        channels: frozenset[str],
        messages: "asyncio.Queue[Message | None]",
    ) -> None:
        self._nodes = nodes
        self._channels = channels
        self._messages = messages
        self._lines: dict[Address, _Line] = {}
        self._disturbed = asyncio.Event()
        self._is_kept = False

    async def keep(self, clock: Clock, group: asyncio.TaskGroup) -> None:
        """Read all lines, and settle anew whenever one is lost or a slot moved; until cancelled."""
        self._is_kept = True
        with self._nodes.watched(self._disturbed):
            while True:
                for line in self._lines.values():
                    if line.reader is None:
                        line.reader = group.create_task(self._read(line.connection))
                await self._disturbed.wait()
                self._disturbed.clear()
                try:
                    await self.settle()
                except _LOST as error:
                    logger.info("some channels are not heard yet: %s", error)
                    self._disturbed.set()
                    await clock.sleep(_RETRY_DELAY_S)

    async def settle(self) -> None:
        """Subscribe to each channel where its slot is; what is well already stays.

        Raises:
            RedisError, OSError, TimeoutError: not all of it could be done.
        """
        await self._nodes.refresh(self._nodes.version)
        wanted: defaultdict[Address, set[str]] = defaultdict(set)
        for channel in self._channels:
            owner = self._nodes.owner(channel)
            if owner is None:
                raise RedisConnectionError(f"nobody has the slot of {channel}")
            wanted[owner].add(channel)
        for address, line in tuple(self._lines.items()):
            if line.is_lost or wanted[address] != line.channels:
                del self._lines[address]
                await line.close()
        missing = [
            address
            for address, channels in wanted.items()
            if channels and address not in self._lines
        ]
        opened = await asyncio.gather(
            *(self._open(address, wanted[address]) for address in missing),
            return_exceptions=True,
        )
        for error in opened:
            if error is not None:
                raise error

    def stop(self) -> None:
        """End the readers."""
        for line in self._lines.values():
            if line.reader is not None:
                line.reader.cancel()

    async def close(self) -> None:
        """Close all."""
        for line in self._lines.values():
            await line.close()

    async def _open(self, address: Address, channels: set[str]) -> None:
        connection = self._nodes.subscriber(address)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await connection.connect()  # type: ignore[no-untyped-call]
                await _subscribe(connection, channels)
            if self._is_kept:  # else nobody has listened yet, and nothing was missed
                await self._messages.put(None)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._lines[address] = _Line(connection, channels)

    async def _read(self, connection: AbstractConnection) -> None:
        try:
            await self._pass_on(connection)
        finally:
            self._disturbed.set()

    async def _pass_on(self, connection: AbstractConnection) -> None:
        """Pass messages on until the connection is lost or a slot leaves its server."""
        is_asked = False
        while True:
            try:
                answer = await connection.read_response(timeout=QUIET_S)
                if answer is None and is_asked:
                    return  # no message, and no answer to the question either
                if answer is None:
                    await connection.send_command("PING", check_health=False)
            except _LOST as error:
                logger.info("a subscription was lost: %s", error)
                return
            is_asked = answer is None
            if answer is not None and answer[0] == b"smessage":
                await self._messages.put((answer[1].decode(), answer[2]))
            elif answer is not None and answer[0] == b"sunsubscribe":
                return  # the server's own doing: the slot has another owner


async def _subscribe(connection: AbstractConnection, channels: set[str]) -> None:
    """Subscribe and await every confirmation.

    One command for each channel: those of one command must share a slot. A message that comes
    between is dropped, because whoever listens reads after this.
    """
    for channel in channels:
        await connection.send_command("SSUBSCRIBE", channel)
    confirmed = 0
    while confirmed < len(channels):
        answer = await connection.read_response()
        confirmed += answer[0] == b"ssubscribe"

"""Group commit: all calls of one process travel in batches, one connection for each server.

Owns the batches, their retries and the function libraries; `redis_nodes` knows where a key lives.
What arrives while a batch is under way goes with the next one, so a lone call is not delayed and a
busy process pays one write, one fsync wait and one read for many calls (measured: 43 k function
calls/s so, 22 k/s from 64 connections). Invariant: a call is repeated after a lost answer, so every
call made here must be harmless when it is applied twice.
"""

import asyncio
import logging
from collections import deque
from typing import Any

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from serve_app.adapters.metrics import store_answered
from serve_app.adapters.redis_batch import Command
from serve_app.adapters.redis_library import RedisLibrary
from serve_app.adapters.redis_nodes import Address, RedisNodes
from serve_app.core.errors import OverloadedError, StoreUnavailableError
from serve_app.ports import Clock

logger = logging.getLogger(__name__)

BATCH_MAX = 512  # calls in one batch: bounds the server's single turn to some 10 ms
WAITING_MAX = 20_000  # calls without an answer; beyond it the process is overloaded
RETRY_FOR_S = 10.0  # longer than a restart of the server with a warm append-only file
ACK_WAIT_MS = 1000  # for replicas to have a batch; then it is sent again
_RETRY_DELAY_S = 0.05
_RETRY_DELAY_MAX_S = 0.5
_UNREACHED = (RedisConnectionError, RedisTimeoutError, OSError)
# A slot that is moved key by key (ASK, TRYAGAIN) has its keys in two places. A function must see
# all of them or none, so such a slot waits until it has moved.
_NOT_NOW = (
    *_UNREACHED,
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    TryAgainError,
)
# The server is full, lacks replicas or disk, or does not let us; nothing was applied.
_REFUSALS = (AuthenticationError, NoPermissionError, OutOfMemoryError)
_REFUSAL_PREFIXES = ("MISCONF ", "NOREPLICAS ")


class RedisCalls:
    """One connection of this process to each server, shared by all its coroutines."""

    def __init__(self, nodes: RedisNodes, clock: Clock) -> None:
        self._nodes = nodes
        self._clock = clock
        self._library = RedisLibrary()
        self._lanes: dict[Address, _Lane] = {}
        self._waiting_count = 0

    async def fcall(self, function: str, key: str, *args: str | bytes | int) -> Any:
        """Call a function of our libraries on the slot of `key`."""
        return await self._call(key, ("FCALL", self._library.name_of(function), 1, key, *args))

    async def call(self, command: str, key: str, *args: str | bytes | int) -> Any:
        """Send one command with the next batch for the server of `key`, and await its answer.

        Raises:
            OverloadedError: too many calls wait already.
            StoreUnavailableError: the server stayed out of reach, or refuses writes.
        """
        return await self._call(key, (command, key, *args))

    async def close(self) -> None:
        """Let the calls under way finish, then disconnect."""
        for lane in tuple(self._lanes.values()):
            await lane.finish()
        await self._nodes.close()

    async def _call(self, key: str, command: Command) -> Any:
        if self._waiting_count >= WAITING_MAX:
            raise OverloadedError(f"{WAITING_MAX} calls wait for the store; try again later")
        self._waiting_count += 1
        try:
            return await self._until_answered(key, command)
        finally:
            self._waiting_count -= 1

    async def _until_answered(self, key: str, command: Command) -> Any:
        give_up_s = self._clock.monotonic_s() + RETRY_FOR_S
        delay_s = 0.0  # the first repeat goes at once: an idle connection may have been closed
        while True:
            known = self._nodes.version
            address = self._nodes.owner(key)
            try:
                if address is None:
                    await self._nodes.refresh(known)
                    continue
                return await self._lane(address).send(key, command)
            except (RedisError, OSError) as error:
                if _is_refusal(error):
                    raise StoreUnavailableError(f"the store refuses: {error}") from error
                is_library_missing = self._library.is_missing(error)
                if not is_library_missing and not isinstance(error, _NOT_NOW):
                    raise
                if self._clock.monotonic_s() > give_up_s:
                    raise StoreUnavailableError(f"the store cannot be reached: {error}") from error
                why = error
            await self._clock.sleep(delay_s)
            delay_s = min(max(2 * delay_s, _RETRY_DELAY_S), _RETRY_DELAY_MAX_S)
            await self._heed(why, key, address, known)

    async def _heed(self, why: Exception, key: str, address: Address | None, known: int) -> None:
        """Do what an error asks for before the call is sent again."""
        try:
            if isinstance(why, MovedError):
                host = why.host or (address[0] if address else "")  # empty: the one that was asked
                self._nodes.move(key, (host, why.port))
            elif address is not None and self._library.is_missing(why):
                await self._library.load(self._nodes.client(address))
            else:
                await self._nodes.refresh(known)
        except (*_UNREACHED, *_NOT_NOW) as error:
            logger.info("the store is not ready: %s", error)  # the call finds out by itself

    def _lane(self, address: Address) -> "_Lane":
        lane = self._lanes.get(address)
        if lane is None:
            lane = self._lanes[address] = _Lane(self._nodes, address, self._clock)
        return lane


class _Lane:
    """The batches for one server, one after the other."""

    def __init__(self, nodes: RedisNodes, address: Address, clock: Clock) -> None:
        self._clock = clock
        self._nodes = nodes
        self._address = address
        self._waiting: deque[tuple[str, Command, asyncio.Future[Any]]] = deque()
        self._pump: asyncio.Task[None] | None = None

    def send(self, key: str, command: Command) -> "asyncio.Future[Any]":
        """The answer to come; an error is the server's own, or that there was none."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, command, answer))
        if self._pump is None or self._pump.done():
            # Not in a TaskGroup: it serves every caller, so it must outlive the one that starts it.
            self._pump = asyncio.get_running_loop().create_task(self._drain())
        return answer

    async def finish(self) -> None:
        """Wait for the batches under way."""
        if self._pump is not None and not self._pump.done():
            await self._pump

    async def _drain(self) -> None:
        while self._waiting:
            size = min(len(self._waiting), BATCH_MAX)
            batch = [self._waiting.popleft() for _ in range(size)]
            sent_s = self._clock.monotonic_s()
            try:
                answers = await self._exchange(batch[0][0], [command for _, command, _ in batch])
                store_answered(len(batch), self._clock.monotonic_s() - sent_s)
            except _UNREACHED as error:
                answers = [RedisConnectionError(str(error)) for _ in batch]
            except BaseException as error:
                for _, _, answer in batch:
                    if not answer.done():
                        answer.set_exception(RedisConnectionError(str(error)))
                raise
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    async def _exchange(self, key: str, commands: list[Command]) -> list[Any]:
        replicas = self._nodes.options.ack_replicas
        if not replicas:
            return await self._nodes.exchange(self._address, commands)
        # WAIT counts from this connection's last write, and a repeated call may write nothing: its
        # first try was over another connection. So one write of its own stands before it.
        sync = ("SET", f"{key[: key.index('}') + 1]}:sync", "", "PX", 60_000)
        wait = ("WAIT", replicas, ACK_WAIT_MS)
        *answers, synced, reached = await self._nodes.exchange(
            self._address, [*commands, sync, wait]
        )
        if not isinstance(synced, Exception) and reached >= replicas:
            return answers
        why = f"{reached} of {replicas} replicas have the write"
        return [
            answer if isinstance(answer, Exception) else RedisConnectionError(why)
            for answer in answers
        ]


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, _REFUSALS) or str(error).startswith(_REFUSAL_PREFIXES)

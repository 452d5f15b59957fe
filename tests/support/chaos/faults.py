"""What befalls the processes, the network and the store; and how long until others go on."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from tests.support.chaos.ledger import TakeOver
from tests.support.chaos.world import PARTITIONS, Actor, World

LOOK_S = 0.005
WATCH_S = 30.0
OFFSETS_MS = (0, 0, -1_500, 1_500)
KILL, STOP, STORE = "kill -9 executor", "SIGSTOP executor beyond its lease", "kill -9 store"


class Storm:
    """Faults at random moments of one run; of these kinds, or of all."""

    def __init__(self, world: World, seed: int, kinds: Collection[str] = ()) -> None:
        self._world = world
        self._ledger = world.ledger
        self._rng = random.Random(seed)
        self._active: set[str] = set()
        self._begun = 0
        self._busy: set[int] = set()  # places that a fault has its hand on
        faults: list[tuple[int, str, Callable[[], Awaitable[None]]]] = [
            (8, KILL, self._kill_executor),
            (3, STOP, self._stop_executor),
            (3, "cut connections", self._cut),
            (2, "delayed connections", self._delay),
            (2, "half-open connections", self._half_open),
            (2, "refused connections", self._refuse),
            (2, STORE, self._kill_store),
            (3, "kill -9 model replica", lambda: self._kill("model")),
            (2, "kill -9 dispatcher", lambda: self._kill("dispatcher")),
        ]
        self._faults = [fault for fault in faults if not kinds or fault[1] in kinds]

    async def rage(self, seconds: float, every_s: tuple[float, float] = (0.4, 1.4)) -> None:
        """Let faults befall for a time; all is whole again when it returns."""
        weights = [weight for weight, _, _ in self._faults]
        end_s = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            while asyncio.get_running_loop().time() < end_s:
                _, kind, fault = self._rng.choices(self._faults, weights)[0]
                group.create_task(self._one(kind, fault))
                await asyncio.sleep(self._rng.uniform(*every_s))

    async def _one(self, kind: str, fault: Callable[[], Awaitable[None]]) -> None:
        if kind in self._active:
            return
        self._active.add(kind)
        self._begun += 1
        self._ledger.write("fault", kind=kind)
        try:
            await fault()
            self._ledger.faults[kind] += 1
        except _NobodyLeftError:
            return
        finally:
            self._active.discard(kind)

    async def _kill_executor(self) -> None:
        with self._victim("executor") as actor:
            await self._take(actor, KILL, self._world.kill)
            await asyncio.sleep(self._rng.uniform(0.05, 1.0))
            offset_ms = self._rng.choice(OFFSETS_MS)
            if offset_ms:
                self._ledger.faults["clock offset"] += 1
            await self._world.start(actor, offset_ms)

    async def _stop_executor(self) -> None:
        """The stale owner: it stops, loses its lease, and comes back believing that it has it."""
        with self._victim("executor") as actor:
            try:
                await self._take(actor, STOP, lambda one: os.kill(one.pid, signal.SIGSTOP))
                await asyncio.sleep(self._rng.uniform(0, 1.0))
            finally:
                os.kill(actor.pid, signal.SIGCONT)

    async def _cut(self) -> None:
        for proxy in self._world.proxies:
            proxy.cut()

    async def _delay(self) -> None:
        proxy = self._rng.choice(self._world.proxies)
        proxy.delay_s = self._rng.uniform(0.02, 0.2)
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        proxy.delay_s = 0

    async def _half_open(self) -> None:
        """Nothing passes any more and nobody says so, then the connection breaks."""
        proxy = self._rng.choice(self._world.proxies)
        proxy.is_silent = True
        await asyncio.sleep(self._rng.uniform(1, 4.5))
        proxy.is_silent = False
        proxy.cut()

    async def _refuse(self) -> None:
        proxy = self._rng.choice(self._world.proxies)
        proxy.is_refusing = True
        proxy.cut()
        await asyncio.sleep(self._rng.uniform(0.2, 1.5))
        proxy.is_refusing = False

    async def _kill_store(self) -> None:
        store = self._world.store
        assert store.pid is not None
        os.kill(store.pid, signal.SIGKILL)
        await store.wait()
        await asyncio.sleep(self._rng.uniform(0, 1.0))
        await store.start()

    async def _kill(self, role: str) -> None:
        with self._victim(role) as actor:
            self._world.kill(actor)
            await asyncio.sleep(self._rng.uniform(0.1, 1.0))
            await self._world.start(actor)

    @contextmanager
    def _victim(self, role: str) -> Iterator[Actor]:
        """One process that no other fault has its hand on; one of its role is always left alone."""
        free = [one for one in self._world.of_role(role) if one.place not in self._busy]
        if len(free) < 2:
            raise _NobodyLeftError
        actor = self._rng.choice(free)
        self._busy.add(actor.place)
        try:
            yield actor
        finally:
            self._busy.discard(actor.place)

    async def _take(self, actor: Actor, kind: str, strike: Callable[[Actor], None]) -> None:
        """Strike an owner down, and time how long each of its executions stands."""
        begun, is_alone = self._begun, len(self._active) == 1
        try:
            worker_id = await self._world.worker_id(actor)
            owned = await self._owned(worker_id) if worker_id else {}
        except (RedisError, OSError):
            owned = {}
        strike(actor)
        struck_s = asyncio.get_running_loop().time()
        standing = dict(owned)
        while standing and asyncio.get_running_loop().time() - struck_s < WATCH_S:
            try:
                present = await self._states(list(standing))
            except (RedisError, OSError):
                await asyncio.sleep(LOOK_S)
                continue
            now_s = asyncio.get_running_loop().time()
            for execution_id, (owner, seq) in present.items():
                token, seq_before = standing[execution_id]
                if owner == token:
                    standing[execution_id] = (token, seq)  # its last commit got in
                elif seq > seq_before:
                    del standing[execution_id]
                    alone = is_alone and self._begun == begun
                    took_s = now_s - struck_s
                    self._ledger.take_overs.append(TakeOver(kind, alone, took_s))
                    self._ledger.write("taken over", kind=kind, id=execution_id, took_s=took_s)
            await asyncio.sleep(LOOK_S)
        for execution_id in standing:
            self._ledger.take_overs.append(TakeOver(kind, is_alone=False, took_s=WATCH_S))
            self._ledger.write("not taken over", kind=kind, id=execution_id)

    async def _owned(self, worker_id: str) -> dict[str, tuple[str, int]]:
        async with self._world.look() as client:
            ids: list[str] = []
            for partition in range(PARTITIONS):
                members = await client.smembers(f"ip:{{{partition}}}:owned:{worker_id}")
                ids += [one.decode() for one in members]
        states = await self._states(ids)
        return {one: state for one, state in states.items() if worker_id in state[0]}

    async def _states(self, ids: list[str]) -> dict[str, tuple[str, int]]:
        async with self._world.look() as client:
            pipeline = client.pipeline(transaction=False)
            for execution_id in ids:
                partition = int(execution_id[4:6], 16)
                pipeline.hmget(f"ip:{{{partition}}}:s:{execution_id}", "owner", "seq")
            rows = await pipeline.execute()
        return {
            execution_id: ((owner or b"").decode(), int(seq or 0))
            for execution_id, (owner, seq) in zip(ids, rows, strict=True)
        }


class _NobodyLeftError(Exception):
    """Whoever could be struck is struck already."""

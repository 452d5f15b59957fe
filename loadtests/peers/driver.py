"""What is measured of an arm, and how: the same requests, counts and kills for every peer.

Owns the figures. Invariant: every wait has an end; what did not come within it is missing from the
figures, and the table shows a dash.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.http_client import Connection, Timings, closed_loop
from loadtests.peers.arm import Arm, Request
from loadtests.peers.work import LAST, Work

CALLERS = 64
WARM_S, ALONE_S, SLOW_S, LOADED_S = 1.0, 2.0, 2.0, 3.0
SLOW_MS = 10
BATCH_WITHIN_S = 30.0
WATCHED = 16  # executions under way when the worker is lost
WATCHED_MS = 600
KILL_AFTER_S = 0.2  # into the second step
RECOVERED_WITHIN_S = 30.0
CANCELS = 5
CANCELLED_MS = 4000  # of the step that a cancel stops
POLL_S = 0.002
REST_SHARE = 0.25  # of a core: below it, what follows a start (imports, migrations) is over
REST_WITHIN_S = 20.0


@dataclass(slots=True)
class Figures:
    """All rounds of one arm; times in ms, `recovery` and so on in s."""

    alone: list[Timings] = field(default_factory=list)
    slow: list[Timings] = field(default_factory=list)
    loaded: list[Timings] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    starts_per_s: list[float] = field(default_factory=list)
    done_per_s: list[float] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    again_in_flight: list[float] = field(default_factory=list)
    again_finished: list[float] = field(default_factory=list)
    cancel_ms: list[float] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step:
    """What a watched step did, and when (monotonic seconds)."""

    what: str
    work_id: str
    step: int
    at_s: float


class Journal:
    """The lines that watched steps write."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "steps"

    def read(self, prefix: str) -> list[Step]:
        """What the works whose ids begin so did, in order."""
        if not self._path.exists():
            return []
        lines = (line.split() for line in self._path.read_text(encoding="utf-8").splitlines())
        found = [Step(what, work, int(step), float(at)) for what, work, step, at in lines]
        return [one for one in found if one.work_id.startswith(prefix)]

    async def wait(self, prefix: str, what: str, step: int, count: int, within_s: float) -> bool:
        """Until so many different works did this; false when the time is over."""
        give_up_s = time.monotonic() + within_s
        while time.monotonic() < give_up_s:
            found = {o.work_id for o in self.read(prefix) if o.what == what and o.step == step}
            if len(found) >= count:
                return True
            await asyncio.sleep(POLL_S)
        return False


async def measure(arm: Arm, figures: Figures, number: int) -> None:
    """One round of one arm; `number` makes the watched works' ids differ."""
    await _rest(arm)
    await _loop(arm, CALLERS, WARM_S, Work())
    figures.alone.append(await _loop(arm, 1, ALONE_S, Work()))
    if arm.takes_time:
        figures.slow.append(await _loop(arm, 1, SLOW_S, Work(SLOW_MS)))
    before_s = arm.cpu_s()
    figures.loaded.append(await _loop(arm, CALLERS, LOADED_S, Work()))
    figures.cpu_ms.append(1000 * (arm.cpu_s() - before_s) / max(1, figures.loaded[-1].count))
    await _batch(arm, figures)
    if arm.is_watched:
        await _cancels(arm, figures, f"c{number}-")
        await _loss(arm, figures, f"r{number}-")


async def _rest(arm: Arm) -> None:
    """Until the arm's processes have done what they do after their start."""
    give_up_s = time.monotonic() + REST_WITHIN_S
    spent_s = arm.cpu_s()
    while time.monotonic() < give_up_s:
        await asyncio.sleep(1)
        before_s, spent_s = spent_s, arm.cpu_s()
        if spent_s - before_s < REST_SHARE:
            return


async def _loop(arm: Arm, callers: int, seconds: float, work: Work) -> Timings:
    request = arm.run(work)

    async def call(connection: Connection) -> bool:
        status, body = await connection.request(*request)
        return status == 200 and arm.ended_well in body

    async with _Connections(arm.connect, callers) as connections:
        return await closed_loop(callers, seconds, lambda caller: call(connections[caller]))


class _Connections:
    """So many, closed at the end."""

    def __init__(self, connect: Callable[[], Connection], count: int) -> None:
        self._all = [connect() for _ in range(count)]

    async def __aenter__(self) -> list[Connection]:
        return self._all

    async def __aexit__(self, *_: object) -> None:
        for connection in self._all:
            connection.close()


async def _batch(arm: Arm, figures: Figures) -> None:
    """Start a batch from all callers, then wait until the last is done."""
    done = arm.done or (lambda: _size(arm.folder / "ends"))
    request = arm.start(Work())
    before, started_s = done(), time.perf_counter()

    async def caller(connection: Connection) -> None:
        for _ in range(arm.batch // CALLERS):
            await _started(connection, request)

    async with _Connections(arm.connect, CALLERS) as connections:
        await asyncio.gather(*map(caller, connections))
    figures.starts_per_s.append(arm.batch / (time.perf_counter() - started_s))
    give_up_s = time.perf_counter() + BATCH_WITHIN_S
    while done() < before + arm.batch:
        if time.perf_counter() > give_up_s:
            left = before + arm.batch - done()
            figures.missing.append(f"{left} of {arm.batch} not done within {BATCH_WITHIN_S:.0f} s")
            return
        await asyncio.sleep(POLL_S)
    figures.done_per_s.append(arm.batch / (time.perf_counter() - started_s))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


async def _started(connection: Connection, request: Request) -> bytes:
    status, body = await connection.request(*request)
    assert status in {200, 202}, f"{request[1]} answered {status}: {body[:200]!r}"
    return body


async def _cancels(arm: Arm, figures: Figures, prefix: str) -> None:
    """Cancel, one after the other, executions whose first step runs; until it has stopped."""
    journal, latencies = Journal(arm.folder), []
    connect_to_cancel = arm.connect_to_cancel or arm.connect
    async with _Connections(arm.connect, 1) as starting, _Connections(connect_to_cancel, 1) as to:
        for number in range(CANCELS):
            work = Work(CANCELLED_MS, f"{prefix}{number}")
            answer = await _started(starting[0], arm.start(work))
            is_begun = await journal.wait(work.id, "started", 1, 1, RECOVERED_WITHIN_S)
            asked_s = time.monotonic()
            await _started(to[0], arm.cancel(work, answer))
            within_s = CANCELLED_MS / 1000 + 1
            if not (is_begun and await journal.wait(work.id, "stopped", 1, 1, within_s)):
                figures.missing.append("a cancelled step ran to its end")
                return
            stopped = [one for one in journal.read(work.id) if one.what == "stopped"]
            latencies.append(1000 * (stopped[0].at_s - asked_s))
    figures.cancel_ms.append(statistics.median(latencies))


async def _loss(arm: Arm, figures: Figures, prefix: str) -> None:
    """Kill the worker in the midst of all second steps; until all third ones have ended.

    The ideal: the step that was cut off begins again at the moment of the kill.
    """
    journal = Journal(arm.folder)
    async with _Connections(arm.connect, WATCHED) as connections:
        works = [Work(WATCHED_MS, f"{prefix}{number}") for number in range(WATCHED)]
        starts = [_started(to, arm.start(w)) for to, w in zip(connections, works, strict=True)]
        await asyncio.gather(*starts)
    if not await journal.wait(prefix, "started", 2, WATCHED, RECOVERED_WITHIN_S):
        figures.missing.append("not all second steps began")
        return
    await asyncio.sleep(KILL_AFTER_S)
    killed_s = time.monotonic()
    arm.lose_worker()
    if not await journal.wait(prefix, "ended", LAST, WATCHED, RECOVERED_WITHIN_S):
        left = {w.id for w in works} - {
            one.work_id for one in journal.read(prefix) if (one.what, one.step) == ("ended", LAST)
        }
        figures.missing.append(f"{len(left)} not done {RECOVERED_WITHIN_S:.0f} s after the kill")
        return
    steps = journal.read(prefix)
    last_s = max(one.at_s for one in steps if one.what == "ended" and one.step == LAST)
    figures.recovery_s.append(last_s - killed_s - 2 * WATCHED_MS / 1000)
    again, finished = _runs_again(steps)
    figures.again_in_flight.append(again - finished)
    figures.again_finished.append(finished)


def _runs_again(steps: list[Step]) -> tuple[int, int]:
    """Steps that started more than once, and how many of them had ended before."""
    seen: set[tuple[str, int]] = set()
    ended: set[tuple[str, int]] = set()
    again: set[tuple[str, int]] = set()
    finished: set[tuple[str, int]] = set()
    for one in steps:
        key = one.work_id, one.step
        if one.what == "ended":
            ended.add(key)
        elif one.what == "started":
            if key in seen:
                again.add(key)
            if key in ended:
                finished.add(key)
            seen.add(key)
    return len(again), len(finished)

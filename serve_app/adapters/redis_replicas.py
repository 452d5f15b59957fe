"""ReplicaRegistry on Redis: reports are published, and the last one of each replica is kept.

Owns the registry's one hash and its channel. Invariant: a report is a hint with a time on it; one
that is too old counts as no report, so nothing has to be cleaned up after a crash.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import orjson

from serve_app.adapters.redis_blocking import call_blocking
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_subscription import Message, RedisSubscription
from serve_app.core.inference import Begun, Ended, ReplicaLoad, ReplicaNews
from serve_app.core.routing import ReplicaReport
from serve_app.ports import Clock

_HASH = "ip:{config}:replicas"
_CHANNEL = "ip:{config}:reports"
_FORGET_MS = 600_000

_Value = TypeVar("_Value")


class RedisReplicas:
    """See `ports.ReplicaRegistry`."""

    def __init__(self, nodes: RedisNodes, calls: RedisCalls, clock: Clock) -> None:
        self._subscription = RedisSubscription(nodes, (_CHANNEL,), clock)
        self._calls = calls
        self._clock = clock

    async def announce(self, report: ReplicaReport) -> None:
        """Publish a report and keep it as the replica's last."""
        data = orjson.dumps(report)
        await self._calls.call("HSET", _HASH, report.load.replica_id, data)
        await self._calls.call("SPUBLISH", _CHANNEL, data)

    async def withdraw(self, replica_id: str) -> None:
        """Forget a replica that stops."""
        await self._calls.call("HDEL", _HASH, replica_id)

    async def latest(self) -> tuple[ReplicaReport, ...]:
        """The last report of each replica, oldest first; long dead ones are dropped."""
        rows = await self._calls.call("HGETALL", _HASH)
        reports = sorted((_report(row) for row in rows.values()), key=_age)
        for report in reports:
            if self._clock.now_ms() - report.at_ms > _FORGET_MS:
                await self.withdraw(report.load.replica_id)
        return tuple(reports)

    @asynccontextmanager
    async def reports(self) -> AsyncIterator[AsyncIterator[ReplicaReport]]:
        """Present reports first, then each new one."""
        async with self._subscription.listen() as messages:
            yield self._stream(messages)

    async def _stream(
        self, messages: AsyncIterator[Message | None]
    ) -> AsyncIterator[ReplicaReport]:
        for report in await self.latest():
            yield report
        async for message in messages:
            if message is not None:  # else reports were missed; the next come within a second
                yield _report(message[1])


def announce_start(options: RedisOptions, report: ReplicaReport) -> None:
    """Report a phase from a constructor, where no event loop turns yet."""
    call_blocking(options, "HSET", _HASH, report.load.replica_id, orjson.dumps(report))


@dataclass(frozen=True, slots=True)
class ReplicaPhase:
    """How far a replica has come."""

    phase: str
    detail: str
    models: tuple[str, ...] = ()


def read_phases(options: RedisOptions, since_ms: int) -> tuple[ReplicaPhase, ...]:
    """The phases of replicas that reported since a moment, for whoever starts the cluster."""
    rows = call_blocking(options, "HGETALL", _HASH)
    reports = (_report(row) for row in rows.values())
    return tuple(
        ReplicaPhase(r.phase, r.detail, r.load.models) for r in reports if r.at_ms >= since_ms
    )


def _report(data: bytes | str) -> ReplicaReport:
    members: dict[str, Any] = orjson.loads(data)
    news = members.get("news") or {}
    load = _known(ReplicaLoad, members["load"])
    return ReplicaReport(
        load=replace(load, models=tuple(load.models)),
        phase=members["phase"],
        detail=members["detail"],
        at_ms=members["at_ms"],
        news=ReplicaNews(
            tuple(news.get("arrived", ())),
            tuple(_begun(one) for one in news.get("begun", ())),
            tuple(_known(Ended, one) for one in news.get("ended", ())),
        ),
    )


def _begun(members: dict[str, Any]) -> Begun:
    begun = _known(Begun, members)
    return replace(begun, prefix=tuple(begun.prefix))


def _known(cls: type[_Value], members: dict[str, Any]) -> _Value:
    """The value, without members that only a newer release knows."""
    names = cls.__dataclass_fields__  # type: ignore[attr-defined]
    return cls(**{name: value for name, value in members.items() if name in names})


def _age(report: ReplicaReport) -> int:
    return report.at_ms

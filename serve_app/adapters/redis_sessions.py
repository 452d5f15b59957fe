"""SessionStore in Redis: a hash, a list and a line for each session, in its partition's slot.

Owns how a session is written down. Invariant: a turn is appended by one function call, and only by
whoever stands first in the session's line at that moment.
"""

import orjson

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_index import partition_key
from serve_app.core.session import Session, SessionLimits, SessionMessage, session_partition
from serve_app.ports import TurnLine


class RedisSessions:
    """See `ports.SessionStore`."""

    def __init__(self, calls: RedisCalls, partition_count: int) -> None:
        self._calls = calls
        self._partition_count = partition_count

    @property
    def partition_count(self) -> int:
        """See `ports.SessionStore`."""
        return self._partition_count

    async def create(self, session: Session, idle_ms: int) -> None:
        """See `ports.SessionStore`."""
        members: dict[str, str | int] = {
            "ws": session.workspace,
            "model": session.model,
            "system": session.system,
            "at": session.created_at_ms,
            "used": session.used_at_ms,
        }
        pairs = [part for member in members.items() for part in member]
        await self._call("ip1_session_create", session.id, idle_ms, *pairs)

    async def find(self, session_id: str) -> Session | None:
        """See `ports.SessionStore`."""
        slot = self._slot(session_id)
        row = {} if slot is None else await self._calls.call("HGETALL", _key(slot, session_id))
        if not row:
            return None
        return Session(
            id=session_id,
            workspace=row[b"ws"].decode(),
            model=row[b"model"].decode(),
            system=row[b"system"].decode(),
            created_at_ms=int(row[b"at"]),
            used_at_ms=int(row[b"used"]),
            message_count=int(row.get(b"count", 0)),
            byte_count=int(row.get(b"bytes", 0)),
        )

    async def end(self, session_id: str) -> bool:
        """See `ports.SessionStore`."""
        return bool(await self._call("ip1_session_end", session_id))

    async def messages(self, session_id: str, start: int, limit: int) -> tuple[SessionMessage, ...]:
        """See `ports.SessionStore`."""
        slot = self._slot(session_id)
        if slot is None or limit < 1:
            return ()
        key = f"{_key(slot, session_id)}:m"
        rows = await self._calls.call("LRANGE", key, start, start + limit - 1)
        return tuple(SessionMessage(**orjson.loads(row)) for row in rows)

    async def join(self, session_id: str, turn_id: str, limits: SessionLimits) -> TurnLine:
        """See `ports.SessionStore`."""
        return await self._line(
            "ip1_session_join",
            session_id,
            turn_id,
            limits.lease_ms,
            limits.idle_ms,
            limits.waiting_max,
        )

    async def hold(self, session_id: str, turn_id: str, limits: SessionLimits) -> TurnLine:
        """See `ports.SessionStore`."""
        return await self._line(
            "ip1_session_hold", session_id, turn_id, limits.lease_ms, limits.idle_ms
        )

    async def leave(self, session_id: str, turn_id: str) -> None:
        """See `ports.SessionStore`."""
        await self._call("ip1_session_leave", session_id, turn_id)

    async def keep(
        self,
        session_id: str,
        turn_id: str,
        turn: tuple[SessionMessage, SessionMessage],
        idle_ms: int,
    ) -> TurnLine:
        """See `ports.SessionStore`."""
        byte_count = sum(len(message.content.encode()) for message in turn)
        rows = (orjson.dumps(message) for message in turn)
        return await self._line(
            "ip1_session_keep", session_id, turn_id, idle_ms, turn[-1].at_ms, byte_count, *rows
        )

    async def _line(self, function: str, session_id: str, *args: str | bytes | int) -> TurnLine:
        answer = await self._call(function, session_id, *args)
        return TurnLine.ENDED if answer is None else TurnLine(answer.decode())

    async def _call(self, function: str, session_id: str, *args: str | bytes | int) -> bytes | None:
        slot = self._slot(session_id)
        if slot is None:
            return None
        answer: bytes = await self._calls.fcall(function, slot, session_id, *args)
        return answer

    def _slot(self, session_id: str) -> str | None:
        """The key prefix of a session's partition; None for what is no id of ours."""
        partition = session_partition(session_id, self._partition_count)
        return None if partition is None else partition_key(partition)


def _key(slot: str, session_id: str) -> str:
    return f"{slot}:se:{session_id}"

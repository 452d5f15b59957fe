"""ExecutionStore and WorkerStore on Redis or Valkey.

Owns the arguments and answers of the functions in `redis_functions.lua`, where every key stands.
Invariant: one transition is one function call; nothing here reads, decides and then writes.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeGuard

from serve_app.adapters.event_codec import (
    changed_fields,
    decode_snapshot,
    decode_stored,
    encode_event,
)
from serve_app.adapters.metrics import execution_ended
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_usage import booking_args
from serve_app.core.errors import OverloadedError
from serve_app.core.execution import Execution, ExecutionCreated, Status, new_execution
from serve_app.core.journal import (
    Commit,
    CommitAnswer,
    Committed,
    Conflict,
    Heartbeat,
    Outgoing,
    Owned,
    Stale,
    StoredEvent,
    partition_of,
)
from serve_app.core.usage import spending_of
from serve_app.ports import Accepted, ListQuery

DAY_MS = 24 * 3600 * 1000
# Logs that are more than a list: what applies a message there, by the word before the colon.
APPLIED_BY = MappingProxyType({"webhook": "ip1_webhook_accept"})
_SAME_MS_MAX = 64  # executions of one millisecond in one partition; far above what it can accept


def partition_key(partition: int) -> str:
    """The key prefix of a partition; its braces make it one slot."""
    return f"ip:{{{partition}}}"


class RedisStore:
    """Journals in Redis, one slot per partition."""

    def __init__(
        self,
        calls: RedisCalls,
        *,
        partition_count: int,
        backlog_max: int,
        retention_ms: int,
        usage_kept_ms: int = 400 * DAY_MS,
    ) -> None:
        self._calls = calls
        self._partition_count = partition_count
        self._backlog_max = backlog_max
        self._retention_ms = retention_ms
        self._usage_kept_ms = usage_kept_ms

    @property
    def partition_count(self) -> int:
        """Fixed per cluster."""
        return self._partition_count

    async def create(
        self, execution_id: str, created: ExecutionCreated, commit_id: str, watcher: str
    ) -> Accepted:
        """See `ports.ExecutionStore`."""
        _, data = encode_event(created)
        answer = await self._calls.fcall(
            "ip1_create",
            self._key(execution_id),
            execution_id,
            commit_id,
            data,
            created.workspace,
            created.workflow_id,
            created.at_ms,
            created.priority,
            watcher,
            self._backlog_max,
        )
        if answer[0] == b"new":
            return Accepted(is_new=True, execution=new_execution(execution_id, created))
        if answer[0] == b"same":
            return Accepted(is_new=False, execution=_snapshot(execution_id, answer[1]))
        raise OverloadedError(
            f"{self._backlog_max} executions wait in this partition already; try again later"
        )

    async def commit(self, commit: Commit) -> CommitAnswer:
        """See `ports.ExecutionStore`."""
        before, after = commit.before, commit.after
        verb, argument = _verb(commit, self._retention_ms)
        args: list[str | bytes | int] = [
            after.id,
            commit.commit_id,
            before.seq,
            commit.token or "",
            after.status,
            verb,
            argument,
            len(commit.events),
        ]
        for event in commit.events:
            args.extend(encode_event(event))
        changed = changed_fields(before, after, commit.events)
        args.append(len(changed))
        for name, value in changed.items():
            args.extend((name, value))
        args.append(len(commit.outgoing))
        for message in commit.outgoing:
            target = f"{message.target_partition}:{message.log}"
            args.extend((message.message_id, target, message.body))
        if verb == "end":
            args.extend(booking_args(spending_of(after), self._usage_kept_ms))
        answer = await self._calls.fcall("ip1_commit", self._key(after.id), *args)
        if answer[0] == b"new":
            if verb == "end":
                execution_ended(after.status)
            return Committed(ready_depth=int(answer[1]))
        if answer[0] in (b"same", b"conflict"):
            return Conflict(_stored(answer[1]), is_ours=answer[0] == b"same")
        return Stale()

    async def load(self, execution_id: str) -> Execution | None:
        """See `ports.ExecutionStore`."""
        key = f"{self._key(execution_id)}:s:{execution_id}"
        return _snapshot_or_none(execution_id, await self._calls.call("HGETALL", key))

    async def read(self, execution_id: str, after: int, limit: int) -> Sequence[StoredEvent]:
        """See `ports.ExecutionStore`."""
        key = f"{self._key(execution_id)}:j:{execution_id}"
        rows = await self._calls.call("XRANGE", key, f"{after}-1", "+", "COUNT", limit)
        return tuple(
            decode_stored(
                int(entry_id.split(b"-")[0]),
                members[b"k"].decode(),
                members[b"d"],
                members[b"c"].decode(),
            )
            for entry_id, members in rows
        )

    async def watch(self, execution_id: str, watcher: str) -> Execution | None:
        """See `ports.ExecutionStore`."""
        answer = await self._calls.fcall(
            "ip1_watch", self._key(execution_id), execution_id, watcher
        )
        return _snapshot_or_none(execution_id, answer)

    async def recent(self, wanted: ListQuery) -> Sequence[Execution]:
        """See `ports.ExecutionStore`.

        Each partition has its own index, so the newest of each are merged; the status index is
        the narrower one, so a workflow is then looked for among its members.
        """
        found: list[Execution] = []
        before = wanted.before
        while len(found) < wanted.limit:
            page = await self._newest_ids(wanted, before)
            if not page:
                break
            loaded = await asyncio.gather(*(self.load(execution_id) for _, execution_id in page))
            found += [execution for execution in loaded if _matches(execution, wanted)]
            before = page[-1]
        return found[: wanted.limit]

    async def _newest_ids(
        self, wanted: ListQuery, before: tuple[int, str] | None
    ) -> list[tuple[int, str]]:
        suffix = f":ix:{wanted.workspace}"
        if wanted.status is not None:
            suffix += f":st:{wanted.status}"
        elif wanted.workflow_id is not None:
            suffix += f":wf:{wanted.workflow_id}"
        newest = "+inf" if before is None else str(before[0])
        # A few more than asked for: those of the cursor's own millisecond are seen again.
        count = wanted.limit + _SAME_MS_MAX
        pages = await asyncio.gather(
            *(
                self._calls.call(
                    "ZREVRANGEBYSCORE", partition_key(p) + suffix, newest, "-inf", "WITHSCORES",
                    "LIMIT", 0, count,
                )
                for p in range(self._partition_count)
            )
        )  # fmt: skip
        merged = sorted(
            ((int(score), member.decode()) for page in pages for member, score in page),
            reverse=True,
        )
        return [one for one in merged if before is None or one < before][: wanted.limit]

    async def live_workers(self) -> int:
        """See `ports.ExecutionStore`."""
        return int(await self._calls.fcall("ip1_live_workers", partition_key(0)))

    async def last_seqs(self, execution_ids: Collection[str]) -> Mapping[str, int]:
        """See `ports.ExecutionStore`."""
        keys = [f"{self._key(execution_id)}:s:{execution_id}" for execution_id in execution_ids]
        seqs = await asyncio.gather(*(self._calls.call("HGET", key, "seq") for key in keys))
        found = zip(execution_ids, seqs, strict=True)
        return {execution_id: int(seq) for execution_id, seq in found if seq is not None}

    async def heartbeat(
        self, partition: int, worker_id: str, lease_ttl_ms: int, capacity: int
    ) -> Heartbeat:
        """See `ports.WorkerStore`."""
        now, timer, ready, owned, outbox, reaped, workers = await self._calls.fcall(
            "ip1_heartbeat", partition_key(partition), worker_id, lease_ttl_ms, capacity
        )
        next_timer_ms = int(float(timer))
        return Heartbeat(
            now_ms=int(now),
            next_timer_ms=next_timer_ms if next_timer_ms >= 0 else None,
            ready_depth=ready,
            owned_count=owned,
            outbox_length=outbox,
            reaped_count=reaped,
            workers=tuple(worker.decode() for worker in workers),
        )

    async def claim(self, partition: int, worker_id: str, limit: int) -> Sequence[Owned]:
        """See `ports.WorkerStore`."""
        rows = await self._calls.fcall("ip1_claim", partition_key(partition), worker_id, limit)
        return tuple(_owned(rows))

    async def owned(self, partition: int, worker_id: str) -> Sequence[Owned]:
        """See `ports.WorkerStore`."""
        rows = await self._calls.fcall("ip1_owned", partition_key(partition), worker_id)
        return tuple(_owned(rows))

    async def reap(self, partition: int, worker_id: str) -> int:
        """See `ports.WorkerStore`."""
        return int(await self._calls.fcall("ip1_reap", partition_key(partition), worker_id))

    async def send(self, outgoing: Outgoing) -> bool:
        """See `ports.WorkerStore`."""
        key = partition_key(outgoing.target_partition)
        args = (outgoing.message_id, outgoing.log, outgoing.body)
        function = APPLIED_BY.get(outgoing.log.partition(":")[0], "ip1_apply")
        return bool(await self._calls.fcall(function, key, *args))

    async def relay(self, partition: int, limit: int) -> int:
        """See `ports.WorkerStore`.

        Applied first, dropped after: a crash between the two sends it again, and the target
        drops the copy by its message id. The sends of one call travel in one batch, in order; one
        that fails stays, and holds up no other.
        """
        outbox = f"{partition_key(partition)}:outbox"
        rows = await self._calls.call("XRANGE", outbox, "-", "+", "COUNT", limit)
        sends = (self.send(_outgoing(members)) for _, members in rows)
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        failures = [one for one in outcomes if isinstance(one, BaseException)]
        sent = [
            entry_id
            for (entry_id, _), outcome in zip(rows, outcomes, strict=True)
            if isinstance(outcome, bool)
        ]
        if sent:
            await self._calls.call("XDEL", outbox, *sent)
        if failures:
            raise failures[0]
        return len(rows)

    def _key(self, execution_id: str) -> str:
        partition = partition_of(execution_id, self._partition_count)
        # An id of no partition is nobody's; any partition answers that it is unknown.
        return partition_key(partition or 0)


def _verb(commit: Commit, retention_ms: int) -> tuple[str, int]:
    """What becomes of the ownership: it follows from the state, so nobody can forget it."""
    if commit.token is None:
        return "append", 0
    if commit.after.is_terminal:
        return "end", retention_ms
    if commit.after.status is Status.WAITING:
        assert commit.after.wake_at_ms is not None, "a waiting execution has a wake time"
        return "park", commit.after.wake_at_ms
    return "keep", 0


def _matches(execution: Execution | None, wanted: ListQuery) -> TypeGuard[Execution]:
    """Whether it is still there and still what the index said when it was read."""
    return (
        execution is not None
        and wanted.status in (None, execution.status)
        and wanted.workflow_id in (None, execution.created.workflow_id)
    )


def _outgoing(members: Mapping[bytes, bytes]) -> Outgoing:
    partition_text, _, log = members[b"t"].decode().partition(":")
    return Outgoing(members[b"m"].decode(), int(partition_text), log, members[b"b"])


def _stored(rows: Iterable[Any]) -> tuple[StoredEvent, ...]:
    return tuple(
        decode_stored(int(seq), kind.decode(), data, commit_id.decode())
        for seq, kind, data, commit_id in rows
    )


def _owned(rows: Iterable[Any]) -> Iterable[Owned]:
    for execution_id, token, snapshot in rows:
        yield Owned(token.decode(), _snapshot(execution_id.decode(), snapshot))


def _snapshot_or_none(execution_id: str, flat: Sequence[bytes]) -> Execution | None:
    return _snapshot(execution_id, flat) if flat else None


def _snapshot(execution_id: str, flat: Sequence[bytes] | Mapping[bytes, bytes]) -> Execution:
    pairs = flat.items() if isinstance(flat, Mapping) else zip(flat[::2], flat[1::2], strict=True)
    return decode_snapshot(execution_id, {name.decode(): value for name, value in pairs})

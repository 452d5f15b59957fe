"""ExecutionStore and WorkerStore on Redis or Valkey.

Owns the arguments and answers of the functions in `redis_functions.lua`, where every key stands.
Invariant: one transition is one function call. A message that becomes an event is committed under
the sequence number it was decided on, like anybody's append.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import orjson

from serve_app.adapters.event_codec import (
    changed_fields,
    decode_snapshot,
    decode_stored,
    encode_event,
)
from serve_app.adapters.metrics import execution_ended
from serve_app.adapters.payloads import (
    NO_PAYLOADS,
    Splitter,
    references,
    size_of,
)
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_children import send_all, take_child_message
from serve_app.adapters.redis_events import EVENT_LOGS, RedisEvents
from serve_app.adapters.redis_index import Flat, RedisIndex, fields_of, partition_key
from serve_app.adapters.redis_outbox import message_args, note_faults, read_outgoing
from serve_app.adapters.redis_usage import booking_args
from serve_app.adapters.redis_verdicts import entrance, take_verdict
from serve_app.adapters.store_limits import DAY_MS, DEFAULT_LIMITS, StoreLimits
from serve_app.core.app_events import CARRIED_OUT_LOGS
from serve_app.core.children import CHILD_LOGS
from serve_app.core.errors import BodyTooLargeError, OverloadedError, StoreUnavailableError
from serve_app.core.execution import Execution, ExecutionCreated, Status, new_execution
from serve_app.core.gate_messages import GATE_LOG, VERDICT_LOG
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
from serve_app.core.subscriptions import at_acceptance
from serve_app.core.usage import spending_of
from serve_app.ports import Accepted, ListQuery

logger = logging.getLogger(__name__)

Take = Callable[[Outgoing], Awaitable[bool]]

# Logs that are more than a list: what applies a message there, by the word before the colon.
APPLIED_BY = MappingProxyType({"webhook": "ip1_webhook_accept", GATE_LOG: "ip1_gate"})
GATE_HOPS_MAX = 3  # gates asked in a row by one relay: a route has two, and its execution one more
RELAY_NOW_MAX = 64  # messages sent by an acceptance; more are a worker's work


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
        limits: StoreLimits = DEFAULT_LIMITS,
    ) -> None:
        self._calls = calls
        self._partition_count = partition_count
        self._backlog_max = backlog_max
        self._retention_ms = retention_ms
        self._usage_kept_ms = usage_kept_ms
        self._limits = limits
        self._kept_max = max(1, limits.kept_max // partition_count)
        self._index = RedisIndex(calls, partition_count)
        self._events = RedisEvents(calls, partition_count=partition_count, limits=limits)
        self._takers: dict[str, Take] = {}

    @property
    def partition_count(self) -> int:
        """Fixed per cluster."""
        return self._partition_count

    async def create(
        self,
        execution_id: str,
        created: ExecutionCreated,
        commit_id: str,
        watcher: str,
        start_at_ms: int = 0,
    ) -> Accepted:
        """See `ports.ExecutionStore`."""
        splitter = self._splitter()
        _, data = encode_event(created, splitter)
        self._check_input(created, len(data) + sum(map(len, splitter.payloads.values())))
        asked = entrance(execution_id, created, self._partition_count)
        subscriptions = at_acceptance(execution_id, created, self._partition_count)
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
            start_at_ms,
            "" if created.deadline_ms is None else created.deadline_ms,
            *_payload_args(splitter),
            len(subscriptions),
            *(part for message in subscriptions for part in message_args(message)),
            *asked,
        )
        if answer[0] == b"new":
            if asked or subscriptions:
                await self._relay_now(execution_id)
            return Accepted(is_new=True, execution=new_execution(execution_id, created))
        if answer[0] == b"same":
            execution = await self._execution(execution_id, answer[1])
            if execution is not None:
                return Accepted(is_new=False, execution=execution)
            raise StoreUnavailableError(f"{execution_id} is being forgotten; try again")
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
        splitter = self._splitter()
        for event in commit.events:
            args.extend(encode_event(event, splitter))
        changed = changed_fields(before, after, commit.events, splitter)
        args.append(len(changed))
        for name, value in changed.items():
            args.extend((name, value))
        args.append(len(commit.outgoing))
        for message in commit.outgoing:
            args.extend(message_args(message))
        args.extend(_payload_args(splitter))
        if verb == "end":
            args.append(self._kept_max)
            args.extend(booking_args(spending_of(after), self._usage_kept_ms))
        answer = await self._calls.fcall("ip1_commit", self._key(after.id), *args)
        if answer[0] == b"new":
            if verb == "end":
                execution_ended(after.status)
            return Committed(ready_depth=int(answer[1]))
        if answer[0] in (b"same", b"conflict"):
            rows = [(int(seq), kind, data, cid) for seq, kind, data, cid in answer[1]]
            missed = await self._stored(after.id, rows)
            return Conflict(missed, is_ours=answer[0] == b"same")
        return Stale()

    async def load(self, execution_id: str) -> Execution | None:
        """See `ports.ExecutionStore`."""
        key = f"{self._key(execution_id)}:s:{execution_id}"
        return await self._execution(execution_id, await self._calls.call("HGETALL", key))

    async def read(self, execution_id: str, after: int, limit: int) -> Sequence[StoredEvent]:
        """See `ports.ExecutionStore`."""
        key = f"{self._key(execution_id)}:j:{execution_id}"
        rows = await self._calls.call("XRANGE", key, f"{after}-1", "+", "COUNT", limit)
        found: list[tuple[int, bytes, bytes, bytes]] = []
        room = self._limits.page_bytes
        for entry_id, members in rows:
            room -= sum(map(size_of, references((members[b"d"],))))
            if found and room < 0:
                break
            seq = int(entry_id.split(b"-")[0])
            found.append((seq, members[b"k"], members[b"d"], members[b"c"]))
        if found and not found[0][2]:
            # The journal's first entry is kept once, in the snapshot.
            snapshot = f"{self._key(execution_id)}:s:{execution_id}"
            created = await self._calls.call("HGET", snapshot, "created")
            if created is None:
                return ()
            found[0] = (*found[0][:2], created, found[0][3])
        return await self._stored(execution_id, found)

    async def watch(self, execution_id: str, watcher: str) -> Execution | None:
        """See `ports.ExecutionStore`."""
        answer = await self._calls.fcall(
            "ip1_watch", self._key(execution_id), execution_id, watcher
        )
        return await self._execution(execution_id, answer)

    async def recent(self, wanted: ListQuery) -> Sequence[Execution]:
        """See `ports.ExecutionStore`."""
        return await self._index.recent(wanted)

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
        return await self._owned(rows)

    async def owned(self, partition: int, worker_id: str) -> Sequence[Owned]:
        """See `ports.WorkerStore`."""
        rows = await self._calls.fcall("ip1_owned", partition_key(partition), worker_id)
        return await self._owned(rows)

    async def reap(self, partition: int, worker_id: str) -> int:
        """See `ports.WorkerStore`."""
        return int(await self._calls.fcall("ip1_reap", partition_key(partition), worker_id))

    async def send(self, outgoing: Outgoing) -> bool:
        """See `ports.WorkerStore`."""
        key = partition_key(outgoing.target_partition)
        if outgoing.log == VERDICT_LOG:
            return await take_verdict(self, outgoing)
        if outgoing.log in CHILD_LOGS:
            return await take_child_message(self, outgoing)
        if outgoing.log in CARRIED_OUT_LOGS:
            return await self._takers[outgoing.log](outgoing)
        args = (outgoing.message_id, outgoing.log, outgoing.body)
        kind = outgoing.log.partition(":")[0]
        if kind in EVENT_LOGS:
            return await self._events.take(outgoing)
        return bool(await self._calls.fcall(APPLIED_BY.get(kind, "ip1_apply"), key, *args))

    def take_by(self, log: str, take: Take) -> None:
        """Say who carries out the messages of a log; where nobody does, they wait for others."""
        self._takers[log] = take

    async def relay(self, partition: int, limit: int, answers_hops: int = GATE_HOPS_MAX) -> int:
        """See `ports.WorkerStore`; the answers of gates are relayed with what asked for them.

        Applied first, dropped after: a crash between the two sends it again, and the target
        drops the copy by its message id. The sends of one call travel in one batch, in order; one
        that fails stays, and holds up no other. One that fails again and again while the store is
        well is put aside (`p:dead`), because those behind it have to move up.
        """
        outbox = f"{partition_key(partition)}:outbox"
        rows = await self._calls.call("XRANGE", outbox, "-", "+", "COUNT", limit)
        rows = [row for row in rows if self._can_take(read_outgoing(row).log)]
        messages = [read_outgoing(row) for row in rows]
        outcomes = await send_all(messages, self.send)
        failures = [one for one in outcomes if isinstance(one, BaseException)]
        sent = [
            entry_id
            for (entry_id, _), outcome in zip(rows, outcomes, strict=True)
            if isinstance(outcome, bool)
        ]
        if sent:
            await self._calls.call("XDEL", outbox, *sent)
        if failures:
            await note_faults(self._calls, partition, rows, outcomes)
            raise failures[0]
        # A gate answers through its own outbox, and somebody waits for it now.
        gates = {one.target_partition for one in messages if one.log == GATE_LOG}
        for target in gates - {partition} if answers_hops else ():
            await self.relay(target, limit, answers_hops - 1)
        return len(rows)

    def _can_take(self, log: str) -> bool:
        return log not in CARRIED_OUT_LOGS or log in self._takers

    async def _relay_now(self, execution_id: str) -> None:
        """Send what an acceptance left in the outbox; if that fails, a worker's heartbeat does."""
        partition = partition_of(execution_id, self._partition_count)
        assert partition is not None, "the caller made the id"
        try:
            await self.relay(partition, RELAY_NOW_MAX)
        except (StoreUnavailableError, OverloadedError):
            logger.exception("relay failed", extra={"execution_id": execution_id})

    async def _execution(self, execution_id: str, flat: Flat) -> Execution | None:
        snapshot = fields_of(flat)
        payloads = await self._fetch(execution_id, snapshot.values()) if snapshot else None
        return None if payloads is None else decode_snapshot(execution_id, snapshot, payloads)

    async def _owned(self, rows: Iterable[Any]) -> tuple[Owned, ...]:
        found = []
        for execution_id, token, flat in rows:
            execution = await self._execution(execution_id.decode(), flat)
            if execution is not None:
                found.append(Owned(token.decode(), execution))
        return tuple(found)

    async def _stored(
        self, execution_id: str, rows: Sequence[tuple[int, bytes, bytes, bytes]]
    ) -> tuple[StoredEvent, ...]:
        payloads = await self._fetch(execution_id, (data for _, _, data, _ in rows))
        if payloads is None:
            return ()
        return tuple(
            decode_stored(seq, kind.decode(), data, commit_id.decode(), payloads)
            for seq, kind, data, commit_id in rows
        )

    async def _fetch(
        self, execution_id: str, records: Iterable[bytes]
    ) -> Mapping[str, bytes] | None:
        """The payloads that records refer to; None when they expired under our hands."""
        names = references(records)
        if not names:
            return NO_PAYLOADS
        key = f"{self._key(execution_id)}:b:{execution_id}"
        found = await self._calls.call("HMGET", key, *names)
        return None if None in found else dict(zip(names, found, strict=True))

    def _splitter(self) -> Splitter:
        return Splitter(self._limits.inline_bytes)

    def _check_input(self, created: ExecutionCreated, size: int) -> None:
        # The sum is of the whole record: only where it is above the limit the input is measured.
        limit = self._limits.input_bytes
        if size > limit and (size := len(orjson.dumps(created.input))) > limit:
            raise BodyTooLargeError(
                f"the input takes {size} bytes; INFERPIPE_INPUT_MAX_BYTES allows {limit}"
            )

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


def _payload_args(splitter: Splitter) -> list[str | bytes | int]:
    args: list[str | bytes | int] = [len(splitter.payloads)]
    for name, payload in splitter.payloads.items():
        args += (name, payload)
    return args

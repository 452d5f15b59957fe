"""DeliveryQueue: the arguments and answers of the functions in `redis_webhooks.lua`.

Owns the form of a delivery's log: one JSON object a line. Invariant: one step of a delivery is one
function call.
"""

from collections.abc import Sequence
from typing import Any

import orjson

from serve_app.adapters.metrics import webhook_tried
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_index import partition_key
from serve_app.core.delivery import (
    Attempt,
    ClaimedDelivery,
    Delivery,
    DeliveryStatus,
    EndpointHealth,
    Verdict,
)
from serve_app.core.journal import Outgoing
from serve_app.core.webhooks import queue_partition
from serve_app.ports import ClaimedBatch, ClaimLimits, DeliveryQuery, Recorded

FORGET_BATCH = 1000


class RedisDeliveries:
    """Deliveries in Redis, each endpoint's in the partition its id names."""

    def __init__(self, calls: RedisCalls, partition_count: int) -> None:
        self._calls = calls
        self._partition_count = partition_count
        self._claims = [0] * partition_count

    @property
    def partition_count(self) -> int:
        """Fixed per cluster."""
        return self._partition_count

    async def claim(
        self, partition: int, dispatcher_id: str, limit: int, limits: ClaimLimits
    ) -> ClaimedBatch:
        """See `ports.DeliveryQueue`."""
        now, next_at, rows = await self._calls.fcall(
            "ip1_webhook_claim",
            partition_key(partition),
            dispatcher_id,
            limits.lease_ttl_ms,
            limit,
            limits.window_max,
            limits.backlog_max,
            limits.retention_ms,
            self._claims[partition],
        )
        # The number goes up with the answer: a claim whose answer never came is claimed again.
        self._claims[partition] += 1
        return ClaimedBatch(tuple(map(_claimed, rows)), _in_ms(next_at, now))

    async def record(
        self, dispatcher_id: str, claimed: ClaimedDelivery, verdict: Verdict, attempt: Attempt
    ) -> Recorded | None:
        """See `ports.DeliveryQueue`."""
        ended_ms = attempt.at_ms + attempt.latency_ms
        wait_ms = max(0, (verdict.next_at_ms or 0) - ended_ms)
        health = "ok" if attempt.is_success else "bad"
        return await self._record(dispatcher_id, claimed, verdict.status, wait_ms, attempt, health)

    async def drop(self, dispatcher_id: str, claimed: ClaimedDelivery, attempt: Attempt) -> None:
        """See `ports.DeliveryQueue`."""
        await self._record(dispatcher_id, claimed, DeliveryStatus.DEAD, 0, attempt, "")

    async def _record(
        self,
        dispatcher_id: str,
        claimed: ClaimedDelivery,
        status: DeliveryStatus,
        wait_ms: int,
        attempt: Attempt,
        health: str,
    ) -> Recorded | None:
        answer = await self._calls.fcall(
            "ip1_webhook_record",
            self._key(claimed.id),
            dispatcher_id,
            claimed.webhook_id,
            claimed.id,
            claimed.lease,
            status,
            wait_ms,
            orjson.dumps(attempt),
            health,
        )
        if answer[0] != b"new":
            return None
        webhook_tried(status, attempt.latency_ms / 1000)
        _, failures, since, now, next_at = answer
        seen = EndpointHealth(int(failures), int(since) if since else None)
        return Recorded(seen, int(now), _in_ms(next_at, now))

    async def pause(self, webhook_id: str, for_ms: int) -> None:
        """See `ports.DeliveryQueue`."""
        await self._calls.fcall("ip1_webhook_pause", self._key(webhook_id), webhook_id, for_ms)

    async def release(self, partition: int, dispatcher_id: str) -> int:
        """See `ports.DeliveryQueue`."""
        key = partition_key(partition)
        return int(await self._calls.fcall("ip1_webhook_release", key, dispatcher_id))

    async def accept(self, outgoing: Outgoing) -> bool:
        """See `ports.DeliveryQueue`."""
        args = (outgoing.message_id, outgoing.log, outgoing.body)
        key = partition_key(outgoing.target_partition)
        return bool(await self._calls.fcall("ip1_webhook_accept", key, *args))

    async def replay(self, workspace: str, delivery_id: str) -> bool | None:
        """See `ports.DeliveryQueue`."""
        key = self._key(delivery_id)
        answer = int(await self._calls.fcall("ip1_webhook_replay", key, delivery_id, workspace))
        return None if answer < 0 else bool(answer)

    async def delivery(self, delivery_id: str) -> Delivery | None:
        """See `ports.DeliveryQueue`."""
        row = await self._calls.fcall("ip1_webhook_delivery", self._key(delivery_id), delivery_id)
        return _delivery(row) if row else None

    async def deliveries(
        self, wanted: DeliveryQuery
    ) -> tuple[Sequence[Delivery], tuple[int, str] | None]:
        """See `ports.DeliveryQueue`."""
        before_ms, before_id = wanted.before or (wanted.to_ms, "")
        rows, last = await self._calls.fcall(
            "ip1_webhook_deliveries",
            self._key(wanted.webhook_id),
            wanted.webhook_id,
            "+inf" if before_ms is None else before_ms,
            before_id,
            wanted.limit,
            wanted.status or "",
            "-inf" if wanted.from_ms is None else wanted.from_ms,
        )
        cursor = (int(last[0]), last[1].decode()) if last else None
        return tuple(map(_delivery, rows)), cursor

    async def forget(self, webhook_id: str) -> None:
        """See `ports.DeliveryQueue`."""
        key = self._key(webhook_id)
        while await self._calls.fcall("ip1_webhook_forget", key, webhook_id, FORGET_BATCH):
            pass  # other calls come between: no single turn of the server is long

    def _key(self, an_id: str) -> str:
        # An id of no partition is nobody's; any partition answers that it is unknown.
        return partition_key(queue_partition(an_id, self._partition_count) or 0)


def _in_ms(at: bytes, now: bytes) -> int | None:
    when = int(float(at))
    return None if when < 0 else max(0, when - int(now))


def _claimed(row: Sequence[Any]) -> ClaimedDelivery:
    *texts, tries, body = row
    delivery_id, lease, webhook_id, workspace, event_id, kind = (text.decode() for text in texts)
    return ClaimedDelivery(
        delivery_id, lease, webhook_id, workspace, event_id, kind, int(tries), body
    )


def _delivery(row: Sequence[bytes]) -> Delivery:
    *texts, log = row
    delivery_id, workspace, webhook_id, event_id, kind, status, at, next_at = (
        text.decode() for text in texts
    )
    return Delivery(
        delivery_id,
        webhook_id,
        workspace,
        event_id,
        kind,
        DeliveryStatus(status),
        tuple(_attempt(line) for line in log.splitlines()),
        int(next_at) if next_at else None,
        int(at),
    )


def _attempt(line: bytes) -> Attempt:
    members: dict[str, Any] = orjson.loads(line)
    # What the store itself notes has no answer and names no status.
    return Attempt(**{"status": None, "answer": "", **members})

"""WebhookStore: the endpoints of each workspace, as one hash.

Owns the records' JSON and the reading that is shared by many ends at once. Invariant: a webhook
that stood when an execution was accepted hears of its end: what is remembered from before that
moment is not believed.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson

from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import CACHE_MAX, CACHE_S, CONFIG_KEY
from serve_app.core.errors import TooManyWebhooksError
from serve_app.core.webhooks import Webhook
from serve_app.ports import Clock

_APART = frozenset({"id", "workspace", "revision"})
_CHANGED, _FULL = 0, -1  # answers of ip1_webhook_put

Reading = tuple[int, "asyncio.Task[tuple[Webhook, ...]]"]


class RedisWebhooks:
    """Endpoints in Redis."""

    def __init__(self, calls: RedisCalls, clock: Clock) -> None:
        self._calls = calls
        self._clock = clock
        self._readings: dict[str, Reading] = {}

    async def put(self, webhook: Webhook, count_max: int) -> bool:
        """See `ports.WebhookStore`."""
        answer = await self._calls.fcall(
            "ip1_webhook_put",
            CONFIG_KEY,
            webhook.workspace,
            webhook.id,
            webhook.revision,
            orjson.dumps(_members(webhook)),
            count_max,
        )
        if answer == _FULL:
            raise TooManyWebhooksError(f"a workspace has at most {count_max} webhooks")
        self._readings.pop(webhook.workspace, None)
        return bool(answer != _CHANGED)

    async def all(self, workspace: str) -> tuple[Webhook, ...]:
        """See `ports.WebhookStore`."""
        rows = await self._calls.call("HGETALL", _key(workspace))
        found = (_webhook(workspace, name.decode(), row) for name, row in rows.items())
        return tuple(sorted(found, key=lambda webhook: (webhook.created_at_ms, webhook.id)))

    async def known(self, workspace: str, not_before_ms: int = 0) -> Sequence[Webhook]:
        """See `ports.WebhookStore`."""
        now_ms = self._clock.now_ms()
        begun_ms, reading = self._readings.get(workspace, (0, None))
        # Begun in the very millisecond, it may have been before.
        is_believed = begun_ms > not_before_ms and now_ms - begun_ms <= CACHE_S * 1000
        if reading is None or not is_believed or _has_failed(reading):
            if len(self._readings) >= CACHE_MAX:
                self._readings.clear()
            # In a task of its own, because it serves whoever else asks meanwhile.
            reading = asyncio.get_running_loop().create_task(self.all(workspace))
            self._readings[workspace] = (now_ms, reading)
        return await asyncio.shield(reading)

    async def remove(self, workspace: str, webhook_id: str) -> bool:
        """See `ports.WebhookStore`."""
        self._readings.pop(workspace, None)
        return bool(await self._calls.call("HDEL", _key(workspace), webhook_id))


def _has_failed(reading: "asyncio.Task[tuple[Webhook, ...]]") -> bool:
    return reading.done() and (reading.cancelled() or reading.exception() is not None)


def _key(workspace: str) -> str:
    return f"{CONFIG_KEY}:hooks:{workspace}"


def _members(webhook: Webhook) -> dict[str, object]:
    names = (name for name in Webhook.__dataclass_fields__ if name not in _APART)
    return {name: getattr(webhook, name) for name in names}


def _webhook(workspace: str, webhook_id: str, row: bytes) -> Webhook:
    revision, _, record = row.partition(b" ")
    members: dict[str, Any] = orjson.loads(record)
    for name in ("events", "modes"):
        members[name] = tuple(members[name])
    return Webhook(id=webhook_id, workspace=workspace, revision=int(revision), **members)

"""One dispatcher: leases due deliveries, sends each, notes what came of it.

Owns the claims, the bound on what is under way and the end of a process. Decides nothing about
outcomes (`core.delivery` does). Invariant: what was leased is recorded, given back, or taken over
by another dispatcher when this one's lease runs out; so a delivery may be sent twice, with the same
id, and is never lost. Told, not polled: bells and the times that claims and records answer wake it;
a look every second renews the lease and finds what no bell told.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from serve_app.core.delivery import (
    Attempt,
    ClaimedDelivery,
    DeliveryStatus,
    Verdict,
    is_given_up,
    judge,
    parse_retry_after,
    pause_ms,
)
from serve_app.core.errors import (
    DeadlineExceededError,
    EgressRefusedError,
    ExchangeFailedError,
    OverloadedError,
    SealBrokenError,
    StoreUnavailableError,
)
from serve_app.core.journal import DeliveriesDue, Notice, Resubscribed
from serve_app.core.webhooks import TEST_EVENT, Webhook, signed_headers
from serve_app.ports import (
    Bells,
    ClaimLimits,
    Clock,
    DeliveryQueue,
    Entropy,
    HttpClient,
    HttpRequest,
    Recorded,
    WebhookStore,
)
from serve_app.services.webhooks import WebhookKeeper, disable

logger = logging.getLogger(__name__)

LOOK_MAX_S = 1.0
LOOKS_PER_LEASE = 4  # a claim renews the lease: one or two may be late
CLAIM_MAX = 64  # deliveries in one answer of the store: bounds its size
ANSWER_BYTES_MAX = 512  # of a receiver's answer kept with the try, for its owner to see
STORE_RETRY_S = 0.5
OWN_HEADERS = {"content-type": "application/json", "user-agent": "inferpipe-webhooks/1"}
_FAILURES = (EgressRefusedError, DeadlineExceededError, ExchangeFailedError, SealBrokenError)
BROKEN = "internal error in the dispatcher"  # all that an owner is told of a bug; the log has it


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    """How deliveries are sent; the fields are settings of the same names."""

    limits: ClaimLimits
    timeout_s: float
    retry_s: Sequence[float]
    inflight_max: int
    disable_after_ms: int


@dataclass(frozen=True, slots=True)
class DispatchRuntime:
    """What a dispatcher works with."""

    queue: DeliveryQueue
    webhooks: WebhookStore
    keeper: WebhookKeeper
    http: HttpClient
    bells: Bells
    clock: Clock
    entropy: Entropy


class Dispatcher:
    """Sends for all partitions under one dispatcher id; an id is used by one process, once."""

    def __init__(
        self, dispatcher_id: str, runtime: DispatchRuntime, policy: DispatchPolicy
    ) -> None:
        self.dispatcher_id = dispatcher_id
        self.counts: Counter[DeliveryStatus] = Counter()
        self.looked_at_s = 0.0
        self._runtime = runtime
        self._queue = runtime.queue
        self._clock = runtime.clock
        self._policy = policy
        self._look_s = min(LOOK_MAX_S, policy.limits.lease_ttl_ms / 1000 / LOOKS_PER_LEASE)
        self._partitions = range(runtime.queue.partition_count)
        self._look_at_s = dict.fromkeys(self._partitions, 0.0)
        self._starved: set[int] = set()  # had more to send than there was room for
        self._flying = 0
        self._wake = asyncio.Event()

    @property
    def flying(self) -> int:
        """Deliveries under way here."""
        return self._flying

    async def run(self) -> None:
        """Serve until cancelled, then give back what was not finished."""
        try:
            async with self._runtime.bells.listen() as notices, asyncio.TaskGroup() as group:
                group.create_task(self._hear(notices))
                group.create_task(self._look(group))
        finally:
            await asyncio.shield(self._give_back())

    async def _hear(self, notices: AsyncIterator[Notice]) -> None:
        async for notice in notices:
            match notice:
                case DeliveriesDue(partition=partition):
                    self._look_soon(partition, 0)
                case Resubscribed():
                    for partition in self._partitions:
                        self._look_soon(partition, 0)
                case _:
                    pass

    def _look_soon(self, partition: int, in_ms: int | None) -> None:
        """Look again then; None: when it is told."""
        if in_ms is not None:
            at_s = self._clock.monotonic_s() + in_ms / 1000
            self._look_at_s[partition] = min(self._look_at_s[partition], at_s)
            self._wake.set()

    async def _look(self, group: asyncio.TaskGroup) -> None:
        while True:
            self._wake.clear()
            now_s = self._clock.monotonic_s()
            due = [p for p in self._partitions if self._look_at_s[p] <= now_s]
            due.sort(key=self._look_at_s.__getitem__)  # who waits longest has the first of the room
            room = max(0, self._policy.inflight_max - self._flying)
            claims = []
            for index, partition in enumerate(due):
                self._look_at_s[partition] = now_s + self._look_s
                # A claim of nothing still shows that we live.
                share = room // len(due) + (index < room % len(due))
                # Of the outer group: all end in one stroke, and no claim outlives the deliveries.
                claim = self._claim(partition, min(CLAIM_MAX, share), group)
                claims.append(group.create_task(claim))
            if claims:
                await asyncio.wait(claims)
            self.looked_at_s = self._clock.monotonic_s()
            await self._rest()

    async def _claim(self, partition: int, limit: int, group: asyncio.TaskGroup) -> None:
        limits = self._policy.limits
        try:
            batch = await self._queue.claim(partition, self.dispatcher_id, limit, limits)
        except (StoreUnavailableError, OverloadedError):
            logger.exception("claim failed", extra={"worker_id": self.dispatcher_id})
            return
        self._flying += len(batch.deliveries)
        for claimed in batch.deliveries:
            group.create_task(self._deliver(partition, claimed))
        if self._flying < self._policy.inflight_max:
            self._look_soon(partition, batch.next_in_ms)
        elif batch.next_in_ms is not None:
            self._starved.add(partition)

    async def _rest(self) -> None:
        wait_s = max(0.0, min(self._look_at_s.values()) - self._clock.monotonic_s())
        try:
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _deliver(self, partition: int, claimed: ClaimedDelivery) -> None:
        next_in_ms: int | None = 0
        try:
            next_in_ms = await self._send(claimed)
        except Exception:  # one delivery's fault must not stop the others; it is tried again
            logger.exception("delivery broke", extra={"delivery_id": claimed.id})
            await self._note(claimed, Attempt(self._clock.now_ms(), None, 0, BROKEN), None)
        finally:
            self._flying -= 1
            self._look_soon(partition, next_in_ms)
            while self._starved:
                self._look_soon(self._starved.pop(), 0)

    async def _send(self, claimed: ClaimedDelivery) -> int | None:
        """Send one; when to look at its partition again."""
        webhook = await self._webhook(claimed)
        if webhook is None:
            await self._queue.forget(claimed.webhook_id)
        if webhook is None or not (webhook.enabled or claimed.event_type == TEST_EVENT):
            reason = None if webhook is None else webhook.disabled_reason
            attempt = Attempt(self._clock.now_ms(), None, 0, reason or "the webhook is disabled")
            await self._queue.drop(self.dispatcher_id, claimed, attempt)
            self.counts[DeliveryStatus.DEAD] += 1
            return 0
        attempt, retry_after_ms = await self._try(webhook, claimed)
        return await self._note(claimed, attempt, retry_after_ms)

    async def _webhook(self, claimed: ClaimedDelivery) -> Webhook | None:
        """The endpoint; what is remembered is believed only where it lets the delivery go on.

        One that is missing there, or disabled, may have been made or enabled a moment ago.
        """
        webhooks = self._runtime.webhooks
        while True:
            try:
                found = _of(await webhooks.known(claimed.workspace), claimed.webhook_id)
                if found is None or not found.enabled:
                    found = _of(await webhooks.all(claimed.workspace), claimed.webhook_id)
            except (StoreUnavailableError, OverloadedError):
                await self._clock.sleep(STORE_RETRY_S)
            else:
                return found

    async def _try(self, webhook: Webhook, claimed: ClaimedDelivery) -> tuple[Attempt, int | None]:
        """Send once; the attempt, and what the receiver asked for in Retry-After."""
        began_ms, began_s = self._clock.now_ms(), self._clock.monotonic_s()
        status, error, answer, retry_after_ms = None, None, "", None
        try:
            got = await self._runtime.http.request(self._request(webhook, claimed, began_ms))
            status = got.status
            answer = got.body.decode("utf-8", "replace")
            retry_after_ms = parse_retry_after(got.headers.get("retry-after"), began_ms)
            error = refusal_of(status)
        except _FAILURES as failure:
            error = str(failure)
        latency_ms = round((self._clock.monotonic_s() - began_s) * 1000)
        return Attempt(began_ms, status, latency_ms, error, answer), retry_after_ms

    def _request(self, webhook: Webhook, claimed: ClaimedDelivery, now_ms: int) -> HttpRequest:
        kept = self._runtime.keeper.open(webhook)
        signed = signed_headers(claimed.event_id, claimed.body, kept.live(now_ms), now_ms)
        return HttpRequest(
            "POST",
            webhook.url,
            {**kept.headers, **OWN_HEADERS, **signed},
            claimed.body,
            self._policy.timeout_s,
            ANSWER_BYTES_MAX,
        )

    async def _note(
        self, claimed: ClaimedDelivery, attempt: Attempt, retry_after_ms: int | None
    ) -> int | None:
        """Record a try until the store has it, and heed what it says of the endpoint.

        Returns when to look at the partition again.
        """
        jitter = self._runtime.entropy.uniform()
        delays_s = self._policy.retry_s
        verdict = judge(attempt, claimed.tries + 1, delays_s, retry_after_ms, jitter)
        recorded = await self._record(claimed, verdict, attempt)
        self.counts[verdict.status] += 1
        if recorded is None:
            return 0  # another dispatcher has it now
        if not attempt.is_success:
            await self._heed(claimed, verdict, recorded)
        return recorded.next_in_ms

    async def _record(
        self, claimed: ClaimedDelivery, verdict: Verdict, attempt: Attempt
    ) -> Recorded | None:
        while True:
            try:
                return await self._queue.record(self.dispatcher_id, claimed, verdict, attempt)
            except (StoreUnavailableError, OverloadedError):
                logger.exception("record failed", extra={"delivery_id": claimed.id})
                await self._clock.sleep(STORE_RETRY_S)

    async def _heed(self, claimed: ClaimedDelivery, verdict: Verdict, recorded: Recorded) -> None:
        """Pause or disable an endpoint that fails again and again."""
        health, reason = recorded.health, verdict.disable_reason
        if is_given_up(health, recorded.now_ms, self._policy.disable_after_ms):
            reason = f"every delivery failed for days, {health.failures} in a row"
        pause = pause_ms(health, self._runtime.entropy.uniform())
        try:
            if pause:
                await self._queue.pause(claimed.webhook_id, pause)
            if reason is not None:
                logger.warning("disabled: %s", reason, extra={"webhook_id": claimed.webhook_id})
                webhooks = self._runtime.webhooks
                await disable(webhooks, claimed.workspace, claimed.webhook_id, reason)
        except (StoreUnavailableError, OverloadedError):
            logger.exception("not paused", extra={"webhook_id": claimed.webhook_id})

    async def _give_back(self) -> None:
        try:
            await asyncio.gather(
                *(self._queue.release(p, self.dispatcher_id) for p in self._partitions)
            )
        except (StoreUnavailableError, OverloadedError):
            logger.exception("give-back failed", extra={"worker_id": self.dispatcher_id})


def _of(webhooks: Sequence[Webhook], webhook_id: str) -> Webhook | None:
    return next((one for one in webhooks if one.id == webhook_id), None)


def refusal_of(status: int) -> str | None:
    """Why an answer of this status does not deliver, in words; None where it does."""
    if 200 <= status < 300:  # noqa: PLR2004 - the 2xx
        return None
    is_redirect = 300 <= status < 400  # noqa: PLR2004 - the 3xx
    return f"answered {status}" + ("; redirects are not followed" if is_redirect else "")

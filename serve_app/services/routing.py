"""The router: hears the replicas, chooses, signs the grant, remembers why. It carries no token.

Owns admission too: what finds no room waits here, where tenants share fairly, and not in an
engine's own queue, where they do not. All requests of one model come to the same router
(`serve_admission`), so its queue is the only one. Invariant: a request waits at most `wait_s` and
its deadline, and each budget and charge is put right by what the replica reports at the end.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from serve_app.core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.fairness import FairQueue, TokenBudgets
from serve_app.core.grants import sign_grant
from serve_app.core.inference import AdmitRequest, Begun, Ended, Grant
from serve_app.core.routing import Choice, Decision, Fleet, ReplicaReport
from serve_app.ports import Clock, Entropy, ReplicaRegistry

GRANT_TTL_MS = 10_000  # enough to open a link to a busy replica; a lost grant is soon worthless
DECISIONS_MAX = 512  # remembered; about 1 KiB each
BILLS_MAX = 100_000  # requests whose real cost is still awaited


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What the router lets wait, and how much a tenant may use; see `Settings`."""

    wait_s: float = 60.0
    queue_max: int = 4096
    tenant_queue_max: int = 2048
    tenant_tokens_per_minute: int = 0


@dataclass(frozen=True, slots=True)
class _Bill:
    tenant: str
    model: str
    reserved_tokens: int  # of the budget
    cost: int  # charged in the queue


class Router:
    """Admission over the fleet that the registry reports."""

    def __init__(
        self,
        registry: ReplicaRegistry,
        secret: bytes,
        clock: Clock,
        entropy: Entropy,
        limits: AdmissionLimits | None = None,
    ) -> None:
        self._registry = registry
        self._secret = secret
        self._clock = clock
        self._entropy = entropy
        self._limits = limits or AdmissionLimits()
        self._fleet = Fleet()
        self._decisions: OrderedDict[str, Decision] = OrderedDict()
        self._queues: dict[str, FairQueue] = {}
        self._budgets = TokenBudgets(self._limits.tenant_tokens_per_minute)
        self._bills: OrderedDict[str, _Bill] = OrderedDict()
        self._answers: dict[str, asyncio.Future[Grant]] = {}

    async def run(self) -> None:
        """Hear reports until cancelled."""
        async with self._registry.reports() as reports:
            await self._hear(reports)

    async def admit(self, request: AdmitRequest) -> Grant:
        """See `ports.Admission`."""
        if request.is_resumed:
            return self._grant(request)
        now_ms = self._clock.now_ms()
        self._budgets.reserve(request.tenant, request.token_count, now_ms)
        cost = request.token_count - self._fleet.overlap_tokens(request)
        try:
            grant = await self._grant_fairly(request, cost)
        except BaseException:
            self._budgets.give_back(request.tenant, request.token_count, now_ms)
            raise
        self._bills[request.request_id] = _Bill(
            request.tenant, request.model, request.token_count, cost
        )
        if len(self._bills) > BILLS_MAX:
            self._bills.popitem(last=False)
        return grant

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        """See `ports.Admission`."""
        newest = list(reversed(self._decisions.values()))
        return tuple(newest[:limit])

    async def _grant_fairly(self, request: AdmitRequest, cost: int) -> Grant:
        queue = self._queues.get(request.model)
        if not queue:
            try:
                grant = self._grant(request)
            except OverloadedError:
                pass  # the model is there, so it may have a queue; the request waits for room
            else:
                self._queue(request.model).charge(request.tenant, cost)
                return grant
        return await self._wait(request, self._queue(request.model), cost)

    async def _wait(self, request: AdmitRequest, queue: FairQueue, cost: int) -> Grant:
        if request.request_id in self._answers:
            raise InvalidRequestError("a request of this id is waiting")
        wait_s = self._limits.wait_s
        if request.deadline_ms is not None:
            wait_s = min(wait_s, (request.deadline_ms - self._clock.now_ms()) / 1000)
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        queue.push(request, cost)
        self._answers[request.request_id] = answer
        try:
            async with asyncio.timeout(wait_s):
                return await answer
        except TimeoutError as error:
            if wait_s < self._limits.wait_s:
                raise DeadlineExceededError("the deadline passed before there was room") from error
            raise OverloadedError(f"no model replica had room for {wait_s:.0f} s") from error
        finally:
            queue.remove(request)
            del self._answers[request.request_id]

    def _serve_waiting(self) -> None:
        """Give the room there is to those that wait, in fair order."""
        for queue in self._queues.values():
            while queue.pop(self._answer) is not None:
                pass

    def _answer(self, request: AdmitRequest) -> bool:
        """Grant a waiting request, or refuse it for good; False: there is no room yet."""
        answer = self._answers[request.request_id]
        try:
            grant = self._grant(request)
        except OverloadedError:
            return False
        except ServeAppError as error:
            if not answer.done():
                answer.set_exception(error)
            return True
        if not answer.done():
            answer.set_result(grant)
        return True

    def _grant(self, request: AdmitRequest) -> Grant:
        now_ms = self._clock.now_ms()
        draws = self._entropy.uniform(), self._entropy.uniform()
        choice = self._fleet.choose(request, now_ms, draws)
        self._record(request, choice, now_ms)
        endpoint = (choice.load.replica_id, choice.load.host, choice.load.port)
        return sign_grant(self._secret, request.request_id, endpoint, now_ms + GRANT_TTL_MS)

    async def _hear(self, reports: AsyncIterator[ReplicaReport]) -> None:
        async for report in reports:
            self._fleet.hear(report)
            for begun in report.news.begun:
                self._compare(begun)
            for ended in report.news.ended:
                self._settle(ended)
            self._serve_waiting()

    def _settle(self, ended: Ended) -> None:
        """Put budget and share right by what the replica counted."""
        bill = self._bills.pop(ended.request_id, None)
        if bill is None:
            return
        spent = ended.prompt_tokens + ended.completion_tokens
        self._budgets.give_back(bill.tenant, bill.reserved_tokens - spent, self._clock.now_ms())
        self._queue(bill.model).settle(bill.tenant, spent - ended.cached_tokens - bill.cost)

    def _queue(self, model: str) -> FairQueue:
        """Only for models that a replica serves: callers make up any number of names."""
        queue = self._queues.get(model)
        if queue is None:
            limits = self._limits
            queue = self._queues[model] = FairQueue(limits.queue_max, limits.tenant_queue_max)
        return queue

    def _record(self, request: AdmitRequest, choice: Choice, now_ms: int) -> None:
        # Under the id of the latest try: a request that was lost is decided again.
        self._decisions.pop(request.request_id, None)
        self._decisions[request.request_id] = Decision(
            request.request_id,
            now_ms,
            request.model,
            request.prompt_tokens,
            choice.reason,
            choice.chosen,
            choice.candidates,
        )
        if len(self._decisions) > DECISIONS_MAX:
            self._decisions.popitem(last=False)

    def _compare(self, begun: Begun) -> None:
        """Put what came true beside what was expected."""
        decision = self._decisions.get(begun.request_id)
        if decision is None:
            return
        self._decisions[begun.request_id] = replace(
            decision, ttft_ms=begun.ttft_ms, cached_tokens=begun.cached_tokens
        )
        self._fleet.learn(decision.chosen, begun.cached_tokens)

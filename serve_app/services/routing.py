"""The router: hears the replicas, chooses, signs the grant, remembers why. It carries no token."""

from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace

from serve_app.core.grants import sign_grant
from serve_app.core.inference import AdmitRequest, Begun, Grant
from serve_app.core.routing import Choice, Decision, Fleet, ReplicaReport
from serve_app.ports import Clock, Entropy, ReplicaRegistry

GRANT_TTL_MS = 10_000  # enough to open a link to a busy replica; a lost grant is soon worthless
DECISIONS_MAX = 512  # remembered; about 1 KiB each


class Router:
    """Admission over the fleet that the registry reports."""

    def __init__(
        self, registry: ReplicaRegistry, secret: bytes, clock: Clock, entropy: Entropy
    ) -> None:
        self._registry = registry
        self._secret = secret
        self._clock = clock
        self._entropy = entropy
        self._fleet = Fleet()
        self._decisions: OrderedDict[str, Decision] = OrderedDict()

    async def run(self) -> None:
        """Hear reports until cancelled."""
        async with self._registry.reports() as reports:
            await self._hear(reports)

    async def admit(self, request: AdmitRequest) -> Grant:
        """See `ports.Admission`."""
        now_ms = self._clock.now_ms()
        draws = self._entropy.uniform(), self._entropy.uniform()
        choice = self._fleet.choose(request, now_ms, draws)
        self._record(request, choice, now_ms)
        endpoint = (choice.load.replica_id, choice.load.host, choice.load.port)
        return sign_grant(self._secret, request.request_id, endpoint, now_ms + GRANT_TTL_MS)

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        """See `ports.Admission`."""
        newest = list(reversed(self._decisions.values()))
        return tuple(newest[:limit])

    async def _hear(self, reports: AsyncIterator[ReplicaReport]) -> None:
        async for report in reports:
            self._fleet.hear(report)
            for begun in report.news.begun:
                self._compare(begun)

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

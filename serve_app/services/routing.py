"""The router: hears the replicas, chooses, signs the grant. It carries no token."""

from collections.abc import AsyncIterator

from serve_app.core.grants import sign_grant
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.core.routing import Fleet, ReplicaReport
from serve_app.ports import Clock, ReplicaRegistry

GRANT_TTL_MS = 10_000  # enough to open a link to a busy replica; a lost grant is soon worthless


class Router:
    """Admission over the fleet that the registry reports."""

    def __init__(self, registry: ReplicaRegistry, secret: bytes, clock: Clock) -> None:
        self._registry = registry
        self._secret = secret
        self._clock = clock
        self._fleet = Fleet()

    async def run(self) -> None:
        """Hear reports until cancelled."""
        async with self._registry.reports() as reports:
            await self._hear(reports)

    async def admit(self, request: AdmitRequest) -> Grant:
        """See `ports.Admission`."""
        now_ms = self._clock.now_ms()
        chosen = self._fleet.choose(request, now_ms)
        endpoint = (chosen.replica_id, chosen.host, chosen.port)
        return sign_grant(self._secret, request.request_id, endpoint, now_ms + GRANT_TTL_MS)

    async def _hear(self, reports: AsyncIterator[ReplicaReport]) -> None:
        async for report in reports:
            self._fleet.hear(report)

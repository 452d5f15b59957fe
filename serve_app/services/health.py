"""Health, sampled once a second: the route answers from the last sample.

Owns what "healthy" means: the store answers, a worker lives, and a model replica is ready where
one is configured. Invariant: asking for health costs a dictionary look-up, so probes and load
balancers may ask as often as they like.
"""

import asyncio
import logging
from dataclasses import dataclass
from types import MappingProxyType

from serve_app.core.errors import ServeAppError
from serve_app.core.routing import REPORT_TTL_MS, ReplicaReport
from serve_app.ports import Clock, ExecutionStore, ReplicaRegistry

logger = logging.getLogger(__name__)

SAMPLE_S = 1.0
SAMPLE_WAIT_S = 3.0  # for the store; calls to it are repeated for longer than a probe can wait
FAILED_SHOWN_MS = 60_000  # how long a replica that died at start is shown


@dataclass(frozen=True, slots=True)
class HealthSample:
    """`status` is healthy, starting or unhealthy; `services` say why."""

    status: str
    services: MappingProxyType[str, MappingProxyType[str, object]]


STARTING = HealthSample("starting", MappingProxyType({}))


class Health:
    """The last sample, kept fresh by `run`."""

    def __init__(
        self,
        store: ExecutionStore,
        registry: ReplicaRegistry,
        clock: Clock,
        models: tuple[str, ...] | None,
    ) -> None:
        """Args: models: the own ids of those that should be served; None: no model plane."""
        self.sample = STARTING
        self._store = store
        self._registry = registry
        self._clock = clock
        self._wanted = models

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample = await self._take()
            await self._clock.sleep(SAMPLE_S)

    async def _take(self) -> HealthSample:
        try:
            async with asyncio.timeout(SAMPLE_WAIT_S):
                workers = await self._store.live_workers()
                reports = await self._registry.latest()
        except (ServeAppError, TimeoutError) as error:
            logger.warning("health: %r", error)
            return _without_store(str(error) or "the store does not answer")
        services: dict[str, dict[str, object]] = {
            "redis": {"status": "up"},
            "workflow_engine": {"status": "up" if workers else "down", "workers": workers},
            "models": self._models(reports),
        }
        states = {str(service["status"]) for service in services.values()}
        status = "unhealthy" if states & {"down", "failed"} else "healthy"
        if "starting" in states and status == "healthy":
            status = "starting"
        frozen = {name: MappingProxyType(service) for name, service in services.items()}
        return HealthSample(status, MappingProxyType(frozen))

    def _models(self, reports: tuple[ReplicaReport, ...]) -> dict[str, object]:
        if self._wanted is None:
            return {"status": "disabled"}
        now_ms = self._clock.now_ms()
        young = [r for r in reports if now_ms - r.at_ms < REPORT_TTL_MS]
        ready = [r for r in young if r.phase == "ready"]
        if ready:
            names = sorted({model for r in ready for model in r.load.models})
            up: dict[str, object] = {"status": "up", "replicas": len(ready), "models": names}
            missing = [model for model in self._wanted if model and model not in names]
            return {**up, "missing": missing} if missing else up
        failed = [r for r in reports if r.phase == "failed" and now_ms - r.at_ms < FAILED_SHOWN_MS]
        if failed:
            return {"status": "failed", "replicas": 0, "detail": failed[-1].detail}
        starting = [r for r in reports if r.phase == "starting"]
        if starting:
            return {"status": "starting", "replicas": 0, "detail": starting[-1].detail}
        return {"status": "starting", "replicas": 0}


def _without_store(detail: str) -> HealthSample:
    """Nothing is known of the others while the store, through which they are heard, is away."""
    unknown = MappingProxyType({"status": "unknown"})
    down = MappingProxyType({"status": "down", "detail": detail})
    services = {"redis": down, "workflow_engine": unknown, "models": unknown}
    return HealthSample("unhealthy", MappingProxyType(services))

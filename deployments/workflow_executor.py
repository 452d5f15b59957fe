"""The workflow executor: one worker in a replica.

It gets no requests; Redis and its peers tell it what to do.
"""

from ray import serve

from deployments.addresses import own_address
from deployments.admission import admission_of
from deployments.background import Background
from deployments.worker import Worker
from serve_app.adapters.collector import set_aside_what_stays
from serve_app.adapters.redis_connect import metrics_of
from serve_app.adapters.serve_admission import Handle
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.telemetry import configure_logging
from serve_app.settings import Settings

STALL_S = 20.0  # no heartbeat for so long: the loop or the store hangs, and nobody else would see


@serve.deployment(
    name="workflow_executor",
    ray_actor_options={"num_cpus": 0.1},
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=10,
)
class WorkflowExecutor:
    """Composes one `Worker` and keeps it running."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: Settings, router: Handle
    ) -> None:
        configure_logging(settings.log_level, json=True, path=settings.log_path("executor"))
        self._clock = SystemClock()
        self._admission = admission_of(settings, router, self._clock, SystemEntropy())
        host = own_address(settings)
        self._worker = Worker(settings, self._admission, self._clock, SystemEntropy(), host)
        await self._worker.begin()
        executor = self._worker.executor
        self._background = Background()
        self._background.start("executor", executor.run())
        metrics = metrics_of(
            settings, self._worker.stores, self._clock, f"executor-{executor.worker_id}"
        )
        self._background.start("metrics", metrics.run())
        self._background.start("timekeeper", self._worker.timekeeper.run())
        self._background.start("peers", self._worker.watch_peers())
        set_aside_what_stays()

    async def check_health(self) -> None:
        """Unhealthy when the worker ended or its heartbeat stands still."""
        self._background.check()
        beat_at_s = self._worker.executor.beat_at_s
        if beat_at_s and self._clock.monotonic_s() - beat_at_s > STALL_S:
            raise RuntimeError(f"no heartbeat for {STALL_S:.0f} s")

    async def __del__(self) -> None:
        await self._background.stop()
        await self._worker.close()
        await self._admission.close()

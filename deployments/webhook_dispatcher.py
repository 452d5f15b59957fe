"""The webhook dispatcher: one sender of deliveries in a replica.

It gets no requests; Redis tells it what is due. Any number of replicas share the work.
"""

from ray import serve

from deployments.background import Background
from deployments.webhooks import dispatcher_of, guarded_http
from serve_app.adapters.collector import set_aside_what_stays
from serve_app.adapters.redis_connect import connect, metrics_of
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.telemetry import configure_logging
from serve_app.settings import Settings

STALL_S = 20.0  # no look at the queues for so long: the loop or the store hangs


@serve.deployment(
    name="webhook_dispatcher",
    ray_actor_options={"num_cpus": 0.05},
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=10,
)
class WebhookDispatcher:
    """Composes one `Dispatcher` and keeps it running."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc] # Serve awaits it
        configure_logging(settings.log_level, json=True, path=settings.log_path("dispatcher"))
        self._clock = SystemClock()
        self._stores = connect(settings, self._clock)
        self._http = guarded_http(settings)
        self._dispatcher = dispatcher_of(
            settings, self._stores, self._http, self._clock, SystemEntropy()
        )
        self._background = Background()
        self._background.start("dispatcher", self._dispatcher.run())
        process = f"dispatcher-{self._dispatcher.dispatcher_id}"
        metrics = metrics_of(settings, self._stores, self._clock, process)
        self._background.start("metrics", metrics.run())
        set_aside_what_stays()

    async def check_health(self) -> None:
        """Unhealthy when the dispatcher ended or looks at no queue any more."""
        self._background.check()
        looked_at_s = self._dispatcher.looked_at_s
        if looked_at_s and self._clock.monotonic_s() - looked_at_s > STALL_S:
            raise RuntimeError(f"no look at the queues for {STALL_S:.0f} s")

    async def __del__(self) -> None:
        await self._background.stop()
        await self._http.close()
        await self._stores.close()

"""The router: one small message per model call, over links of its own."""

from ray import serve

from deployments.addresses import own_address
from deployments.background import Background
from serve_app.adapters.collector import set_aside_what_stays
from serve_app.adapters.redis_connect import connect, metrics_of
from serve_app.adapters.redis_replicas import RedisReplicas
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_admission import AdmissionServer
from serve_app.adapters.tcp_link_peers import Address
from serve_app.adapters.telemetry import configure_logging
from serve_app.core.routing import Decision
from serve_app.services.routing import AdmissionLimits, Router
from serve_app.settings import Settings

# Those that wait for room wait inside a call; beside them there is room for the others.
ASKED_MAX = 1000


@serve.deployment(
    name="router",
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 0.05},
    health_check_period_s=2,
    health_check_timeout_s=10,
)
class RouterDeployment:
    """Hears the replicas and chooses among them."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc] # Serve awaits it
        configure_logging(settings.log_level, json=True, path=settings.log_path("router"))
        clock = SystemClock()
        self._stores = connect(settings, clock)
        registry = RedisReplicas(self._stores.nodes, self._stores.calls, clock)
        secret = settings.cluster_secret.get_secret_value().encode()
        limits = AdmissionLimits(
            settings.admit_wait_s,
            settings.admit_queue_max,
            settings.admit_workspace_queue_max,
            settings.workspace_tokens_per_minute,
        )
        self._router = Router(registry, secret, clock, SystemEntropy(), limits)
        self._background = Background()
        self._background.start("router", self._router.run())
        process = f"router-{SystemEntropy().token()}"
        self._background.start("metrics", metrics_of(settings, self._stores, clock, process).run())
        self._server = AdmissionServer(
            self._router.admit,
            secret,
            clock,
            SystemEntropy(),
            asked_max=settings.admit_queue_max + ASKED_MAX,
        )
        await self._server.start(own_address(settings))
        set_aside_what_stays()

    async def address(self) -> Address:
        """Where it is asked; see `AdmissionServer`."""
        return self._server.address

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        """The latest decisions, newest first."""
        return await self._router.decisions(limit)

    async def check_health(self) -> None:
        """Unhealthy when it no longer hears the replicas."""
        self._background.check()

    async def __del__(self) -> None:
        await self._server.close()
        await self._background.stop()
        await self._stores.close()

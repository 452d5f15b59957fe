"""The ingress: the one FastAPI application in a replica. Stateless but for its hub."""

from fastapi import FastAPI
from ray import serve

from deployments.admission import admission_of
from deployments.background import Background
from deployments.composition import compose, publish
from serve_app.adapters.collector import set_aside_what_stays
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.serve_admission import Handle
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.telemetry import configure_logging
from serve_app.ingress.app import create_app
from serve_app.services.inference import Inference
from serve_app.settings import Settings


@serve.deployment(
    name="ingress",
    max_ongoing_requests=4096,
    ray_actor_options={"num_cpus": 0.1},
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class Ingress:
    """Composes the application over its adapters."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: Settings, router: Handle, deployed: tuple[Handle, ...]
    ) -> None:
        configure_logging(settings.log_level, json=True, path=settings.log_path("ingress"))
        clock, entropy = SystemClock(), SystemEntropy()
        self._settings = settings
        self._deployed = deployed  # held so that Serve deploys them with the application
        self._stores = connect(settings, clock)
        self._link = TcpTokenLink(
            settings.cluster_secret.get_secret_value().encode(), clock, entropy
        )
        inference = Inference(
            admission_of(settings, router, clock, entropy),
            self._link,
            clock,
            settings.resume_wait_s,
        )
        self._services = compose(settings, self._stores, inference, clock, entropy)
        await publish(self._services)
        self._background = Background()
        self._background.start("feeds", self._services.feeds.run())
        self._background.start("health", self._services.health.run())
        self._background.start("metrics", self._services.metrics_page.run())
        if self._services.openai is not None:
            self._background.start("openai", self._services.openai.run())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, once the constructor is done."""
        app = create_app(self._services)
        set_aside_what_stays()
        return app

    async def check_health(self) -> None:
        """Unhealthy when the hub or the sampler has ended."""
        self._background.check()

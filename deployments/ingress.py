"""The ingress: the one FastAPI application in a replica. Stateless but for its hub."""

from importlib.metadata import version

from fastapi import FastAPI
from ray import serve

from deployments.background import Background
from deployments.definitions import catalog_of, publish_definitions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_bells import RedisBells, ingress_channels
from serve_app.adapters.redis_config import RedisKeys
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.redis_replicas import RedisReplicas
from serve_app.adapters.serve_admission import Handle, ServeAdmission
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.telemetry import configure_logging
from serve_app.core.auth import SHOWN_CHARACTERS, KeyRecord, Scope
from serve_app.ingress.app import Services, create_app
from serve_app.ingress.auth import Authenticator
from serve_app.ingress.views import render_sse
from serve_app.services.executions import Executions
from serve_app.services.feeds import Feeds
from serve_app.services.health import Health
from serve_app.services.inference import Inference
from serve_app.settings import Settings
from serve_app.steps import step_types

FIRST_KEY_ID = "first"


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
        ingress_id = entropy.token()
        schemas = JsonSchemas()
        channels = ingress_channels(ingress_id, settings.partitions)
        bells = RedisBells(self._stores.client, channels, clock)
        feeds = Feeds(ingress_id, self._stores.store, bells, clock, render_sse)
        self._link = TcpTokenLink(
            settings.cluster_secret.get_secret_value().encode(), clock, entropy
        )
        inference = Inference(ServeAdmission(router), self._link)
        types = step_types(inference, schemas, entropy)
        catalog = catalog_of(self._stores.calls, types, clock)
        keys = RedisKeys(self._stores.calls, clock)
        registry = RedisReplicas(self._stores.client, self._stores.calls, clock)
        health = Health(self._stores.store, registry, clock, has_models=settings.model_replicas > 0)
        self._services = Services(
            executions=Executions(
                self._stores.store,
                catalog,
                schemas,
                feeds,
                clock,
                entropy,
                timeout_default_ms=settings.timeout_default_ms,
            ),
            feeds=feeds,
            catalog=catalog,
            keys=keys,
            authenticator=Authenticator(keys, settings.workspace_id, is_dev=settings.dev),
            health=health,
            inference=inference,
            clock=clock,
            entropy=entropy,
            settings=settings,
            version=version("inferpipe"),
        )
        await publish_definitions(catalog, settings)
        await _publish_first_key(keys, settings, clock.now_ms())
        self._background = Background()
        self._background.start("feeds", feeds.run())
        self._background.start("health", health.run())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, once the constructor is done."""
        return create_app(self._services)

    async def check_health(self) -> None:
        """Unhealthy when the hub or the sampler has ended."""
        self._background.check()


async def _publish_first_key(keys: RedisKeys, settings: Settings, now_ms: int) -> None:
    key = settings.api_key.get_secret_value()
    shown = key[:SHOWN_CHARACTERS] if len(key) > 2 * SHOWN_CHARACTERS else ""
    record = KeyRecord(
        FIRST_KEY_ID, settings.workspace_id, "first key", (Scope.ADMIN,), shown, now_ms
    )
    await keys.put(key, record)
    await keys.add_workspace(settings.workspace_id, settings.workspace_id)

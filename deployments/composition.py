"""What the ingress is made of: its services over the adapters of one process.

Apart from the deployment, so that tests can run the same application without Ray.
"""

from importlib.metadata import version

from deployments.definitions import catalog_of, children_of, flow_of, publish_definitions
from deployments.events import events_of, hooks_of
from deployments.webhooks import guarded_http, webhooks_of
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.metrics import ProcessMetrics
from serve_app.adapters.redis_bells import RedisBells, ingress_channels
from serve_app.adapters.redis_config import RedisKeys
from serve_app.adapters.redis_connect import RedisConnections, metrics_of
from serve_app.adapters.redis_idempotency import RedisIdempotency
from serve_app.adapters.redis_limits import RedisLimits
from serve_app.adapters.redis_replicas import RedisReplicas
from serve_app.adapters.redis_sessions import RedisSessions
from serve_app.adapters.redis_usage import RedisUsage
from serve_app.adapters.store_limits import DAY_MS
from serve_app.adapters.vllm_openai_lazy import LazyOpenAi
from serve_app.core.auth import SHOWN_CHARACTERS, KeyRecord, Scope
from serve_app.core.limits import NO_LIMITS, Limit, Limits
from serve_app.core.session import SessionLimits
from serve_app.ingress.app import Services
from serve_app.ingress.auth import Authenticator
from serve_app.ingress.views import render_sse
from serve_app.ports import Clock, Entropy, OpenAiModel, OpenAiServing
from serve_app.services.executions import Executions
from serve_app.services.feeds import Feeds
from serve_app.services.health import Health
from serve_app.services.hosts import Hosts
from serve_app.services.inference import Inference
from serve_app.services.limits import KeyLimits
from serve_app.services.sessions import Sessions
from serve_app.settings import Settings
from serve_app.steps import step_types

FIRST_KEY_ID = "first"


def compose(
    settings: Settings,
    stores: RedisConnections,
    inference: Inference,
    clock: Clock,
    entropy: Entropy,
) -> Services:
    """What the routes work with, over the adapters of one process."""
    ingress_id = entropy.token()
    schemas = JsonSchemas()
    bells = RedisBells(stores.nodes, ingress_channels(ingress_id, settings.partitions), clock)
    feeds = Feeds(ingress_id, stores.store, bells, clock, render_sse)
    http = guarded_http(settings)  # opens nothing: here the types only check definitions
    children = children_of(settings, stores.calls, clock, lambda: catalog)
    types = step_types(inference, schemas, entropy, http, settings.http_answer_max_bytes, children)
    catalog = catalog_of(stores.calls, types, clock)
    keys = RedisKeys(stores.calls, clock)
    registry = RedisReplicas(stores.nodes, stores.calls, clock)
    usage = RedisUsage(
        stores.calls,
        partition_count=settings.partitions,
        kept_ms=settings.usage_retention_days * DAY_MS,
    )
    limits = KeyLimits(RedisLimits(stores.calls), usage, clock, default_limits(settings))
    wanted = tuple(dict.fromkeys(settings.own_names.values()))
    health = Health(stores.store, registry, clock, wanted if settings.of_each_model() else None)
    return Services(
        executions=Executions(
            stores.store,
            catalog,
            schemas,
            feeds,
            clock,
            entropy,
            flow=flow_of(settings, stores.calls, clock),
            timeout_default_ms=settings.timeout_default_ms,
        ),
        feeds=feeds,
        catalog=catalog,
        keys=keys,
        idempotency=RedisIdempotency(stores.calls),
        usage=usage,
        limits=limits,
        events=events_of(settings, stores.calls, entropy),
        hooks=hooks_of(settings, stores.calls, catalog, clock, entropy),
        webhooks=webhooks_of(settings, stores.calls, clock, entropy),
        authenticator=Authenticator(keys, limits, clock, settings),
        inference=inference,
        request_metrics=ProcessMetrics(),
        metrics_page=metrics_of(settings, stores, clock, f"ingress-{ingress_id}"),
        sessions=Sessions(
            RedisSessions(stores.calls, settings.partitions), clock, entropy, _limits(settings)
        ),
        hosts=Hosts(registry, clock, entropy),
        openai=_openai(settings, inference, health, clock, entropy),
        health=health,
        clock=clock,
        entropy=entropy,
        settings=settings,
        version=version("inferpipe"),
    )


def default_limits(settings: Settings) -> Limits:
    """Of keys that name none of their own."""
    if not settings.rate_limit_requests:
        return NO_LIMITS
    window_ms = round(settings.rate_limit_window_s * 1000)
    return Limits(requests=Limit(settings.rate_limit_requests, window_ms))


def _limits(settings: Settings) -> SessionLimits:
    return SessionLimits(
        messages_max=settings.session_messages_max,
        bytes_max=settings.session_bytes_max,
        idle_ms=settings.session_idle_s * 1000,
        waiting_max=settings.session_waiting_max,
    )


def _openai(
    settings: Settings, inference: Inference, health: Health, clock: Clock, entropy: Entropy
) -> OpenAiServing | None:
    models = tuple(
        OpenAiModel(
            one.model,
            one.model_names,
            one.context_max,
            one.tool_parser,
            one.reasoning_parser,
            created_s=clock.now_ms() // 1000,
            runner=one.model_runner,
        )
        for one in settings.of_each_model()
    )
    if not (settings.openai and models):
        return None
    return LazyOpenAi(
        models, inference.generate, lambda: health.sample.status == "healthy", clock, entropy
    )


async def publish(services: Services) -> None:
    """Make known what the settings bring: definitions, the first key and its workspace."""
    settings, keys = services.settings, services.keys
    await publish_definitions(services.catalog, settings)
    key = settings.api_key.get_secret_value()
    shown = key[:SHOWN_CHARACTERS] if len(key) > 2 * SHOWN_CHARACTERS else ""
    record = KeyRecord(
        FIRST_KEY_ID,
        settings.workspace_id,
        "first key",
        (Scope.ADMIN,),
        shown,
        services.clock.now_ms(),
    )
    await keys.put(key, record)
    await keys.add_workspace(settings.workspace_id, settings.workspace_id)

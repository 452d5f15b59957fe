"""What of webhooks each process holds: the ingress configures, the executor tells, one sends."""

from serve_app.adapters.aesgcm_vault import AesGcmVault
from serve_app.adapters.aiohttp_http import GuardedHttp
from serve_app.adapters.redis_bells import RedisBells, dispatcher_channels
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_connect import RedisConnections
from serve_app.adapters.redis_deliveries import RedisDeliveries
from serve_app.adapters.redis_webhooks import RedisWebhooks
from serve_app.core.egress import parse_networks
from serve_app.ports import ClaimLimits, Clock, Entropy
from serve_app.services.deliveries import Dispatcher, DispatchPolicy, DispatchRuntime
from serve_app.services.endings import Endings
from serve_app.services.webhooks import WebhookKeeper, Webhooks
from serve_app.settings import Settings


def webhooks_of(settings: Settings, calls: RedisCalls, clock: Clock, entropy: Entropy) -> Webhooks:
    """The use cases of an owner."""
    return Webhooks(
        RedisWebhooks(calls, clock),
        RedisDeliveries(calls, settings.partitions),
        _keeper(settings, entropy),
        clock,
        entropy,
        allowed=parse_networks(settings.egress_allow),
        count_max=settings.webhooks_max,
    )


def endings_of(settings: Settings, calls: RedisCalls, clock: Clock) -> Endings:
    """What an executor tells of ends."""
    base = settings.public_url.rstrip("/") or f"http://{settings.host}:{settings.port}"
    return Endings(
        RedisWebhooks(calls, clock),
        settings.partitions,
        settings.webhook_output_max_bytes,
        lambda execution_id: f"{base}/v1/executions/{execution_id}",
    )


def dispatcher_of(
    settings: Settings,
    stores: RedisConnections,
    http: GuardedHttp,
    clock: Clock,
    entropy: Entropy,
) -> Dispatcher:
    """One dispatcher under an id of its own."""
    channels = dispatcher_channels(settings.partitions)
    runtime = DispatchRuntime(
        RedisDeliveries(stores.calls, settings.partitions),
        RedisWebhooks(stores.calls, clock),
        _keeper(settings, entropy),
        http,
        RedisBells(stores.nodes, channels, clock),
        clock,
        entropy,
    )
    return Dispatcher(entropy.token(), runtime, policy_of(settings))


def policy_of(settings: Settings) -> DispatchPolicy:
    """The dispatcher's slice of the settings."""
    limits = ClaimLimits(
        lease_ttl_ms=settings.webhook_lease_ms,
        window_max=settings.webhook_endpoint_inflight_max,
        backlog_max=settings.webhook_backlog_max,
        retention_ms=settings.webhook_retention_s * 1000,
    )
    return DispatchPolicy(
        limits,
        timeout_s=settings.webhook_timeout_s,
        retry_s=settings.webhook_retry_s,
        inflight_max=settings.webhook_inflight_max,
        disable_after_ms=settings.webhook_disable_after_s * 1000,
    )


def guarded_http(settings: Settings) -> GuardedHttp:
    """The one way out of a process."""
    return GuardedHttp(parse_networks(settings.egress_allow))


def _keeper(settings: Settings, entropy: Entropy) -> WebhookKeeper:
    secret = settings.cluster_secret.get_secret_value().encode()
    return WebhookKeeper(AesGcmVault(secret, entropy))

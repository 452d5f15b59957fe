"""What of events each process holds: the ingress publishes, the executor carries out."""

from deployments.definitions import flow_of
from serve_app.adapters.aesgcm_vault import AesGcmVault
from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.cronsim_schedules import CronSchedules
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_connect import RedisConnections, store_limits
from serve_app.adapters.redis_cron import RedisCron
from serve_app.adapters.redis_events import RedisEvents
from serve_app.adapters.redis_hooks import RedisHooks
from serve_app.core.app_events import CARRIED_OUT_LOGS
from serve_app.ports import Clock, Entropy, WorkflowCatalog
from serve_app.services.events import EventLimits, Events
from serve_app.services.fan_out import FanOut
from serve_app.services.hooks import Hooks
from serve_app.services.timekeeper import BEAT_MS, Timekeeper, Timing
from serve_app.services.triggered_starts import TriggeredStarts
from serve_app.settings import Settings


def events_of(settings: Settings, calls: RedisCalls, entropy: Entropy) -> Events:
    """The use cases of a sender."""
    limits = EventLimits(settings.event_max_bytes, settings.events_batch_max, settings.backlog_max)
    store = RedisEvents(calls, partition_count=settings.partitions, limits=store_limits(settings))
    return Events(store, entropy, limits)


def hooks_of(
    settings: Settings,
    calls: RedisCalls,
    catalog: WorkflowCatalog,
    clock: Clock,
    entropy: Entropy,
) -> Hooks:
    """Webhooks that come in."""
    secret = settings.cluster_secret.get_secret_value().encode()
    return Hooks(
        RedisHooks(calls),
        catalog,
        events_of(settings, calls, entropy),
        AesGcmVault(secret, entropy),
        clock,
        entropy,
        tolerance_ms=settings.hook_tolerance_s * 1000,
    )


def timekeeper_of(
    settings: Settings,
    stores: RedisConnections,
    catalog: WorkflowCatalog,
    clock: Clock,
    worker_id: str,
) -> Timekeeper:
    """What starts workflows at their times, in the name of a worker."""
    return Timekeeper(
        worker_id,
        RedisCron(stores.calls),
        catalog,
        CronSchedules(),
        _starts(settings, stores, clock),
        clock,
        partition_count=settings.partitions,
        timing=Timing(settings.lease_ttl_ms, min(BEAT_MS, settings.lease_ttl_ms // 3)),
    )


def _starts(settings: Settings, stores: RedisConnections, clock: Clock) -> TriggeredStarts:
    return TriggeredStarts(
        stores.store,
        JsonSchemas(),
        flow_of(settings, stores.calls, clock),
        clock,
        timeout_default_ms=settings.timeout_default_ms,
    )


def carry_out_events(
    settings: Settings, stores: RedisConnections, catalog: WorkflowCatalog, clock: Clock
) -> None:
    """Let the relay of this process carry events out."""
    starts = _starts(settings, stores, clock)
    events = RedisEvents(stores.calls, partition_count=settings.partitions)
    fan_out = FanOut(events, stores.store, catalog, CelExpressions(), starts, clock)
    for log in CARRIED_OUT_LOGS:
        stores.store.take_by(log, fan_out.take)

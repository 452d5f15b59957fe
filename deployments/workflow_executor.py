"""The workflow executor: one worker in a replica.

It gets no requests; Redis and its peers tell it what to do.
"""

import asyncio
import logging

from ray import serve

from deployments.addresses import own_address
from deployments.background import Background
from deployments.definitions import catalog_of, children_of
from deployments.webhooks import endings_of, guarded_http
from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_bells import RedisBells, worker_channels
from serve_app.adapters.redis_connect import connect, metrics_of
from serve_app.adapters.serve_admission import Handle, ServeAdmission
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.tcp_peers import TcpPeers
from serve_app.adapters.telemetry import configure_logging
from serve_app.core.errors import StoreUnavailableError
from serve_app.services.executor import Executor, WorkerLimits
from serve_app.services.inference import Inference
from serve_app.services.planner import Runtime
from serve_app.settings import Settings
from serve_app.steps import step_types
from serve_app.steps.bounds import bounded

logger = logging.getLogger(__name__)

STALL_S = 20.0  # no heartbeat for so long: the loop or the store hangs, and nobody else would see


@serve.deployment(
    name="workflow_executor",
    ray_actor_options={"num_cpus": 0.1},
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=10,
)
class WorkflowExecutor:
    """Composes one `Executor` and keeps it running."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: Settings, router: Handle
    ) -> None:
        configure_logging(settings.log_level, json=True, path=settings.log_path("executor"))
        self._clock, entropy = SystemClock(), SystemEntropy()
        host = own_address(settings)
        self._stores = connect(settings, self._clock)
        self._link = TcpTokenLink(
            settings.cluster_secret.get_secret_value().encode(), self._clock, entropy
        )
        inference = Inference(
            ServeAdmission(router, settings.model_name),
            self._link,
            self._clock,
            settings.resume_wait_s,
        )
        self._http = guarded_http(settings)
        types = bounded(
            step_types(
                inference,
                JsonSchemas(),
                entropy,
                self._http,
                settings.http_answer_max_bytes,
                children_of(settings, self._stores.calls, self._clock, lambda: self._catalog),
            ),
            settings.result_max_bytes,
        )
        self._catalog = catalog_of(self._stores.calls, types, self._clock)
        runtime = Runtime(
            self._stores.store,
            types,
            CelExpressions(),
            self._clock,
            entropy,
            endings_of(settings, self._stores.calls, self._clock).outgoing,
            settings.result_max_bytes,
        )
        self._peers = TcpPeers(host, self._clock)
        port = await self._peers.listen()
        # The id names where its peers can feel its pulse, so no directory has to.
        worker_id = f"{host}:{port}~{entropy.token()}"
        channels = worker_channels(worker_id, settings.partitions)
        limits = WorkerLimits(
            settings.lease_ttl_ms, settings.heartbeat_ms, settings.executor_capacity
        )
        self._executor = Executor(
            worker_id,
            runtime,
            RedisBells(self._stores.nodes, channels, self._clock),
            self._catalog,
            limits,
        )
        self._background = Background()
        self._background.start("executor", self._executor.run())
        metrics = metrics_of(settings, self._stores, self._clock, f"executor-{worker_id}")
        self._background.start("metrics", metrics.run())
        self._background.start("peers", self._watch_peers())

    async def check_health(self) -> None:
        """Unhealthy when the worker ended or its heartbeat stands still."""
        self._background.check()
        beat_at_s = self._executor.beat_at_s
        if beat_at_s and self._clock.monotonic_s() - beat_at_s > STALL_S:
            raise RuntimeError(f"no heartbeat for {STALL_S:.0f} s")

    async def _watch_peers(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                peers = await self._executor.peers_changed()
                for peer in self._peers.unwatched(peers):
                    group.create_task(self._watch(peer))

    async def _watch(self, peer: str) -> None:
        if not await self._peers.is_lost(peer):
            return
        try:
            await self._executor.take_over(peer)
        except StoreUnavailableError:
            logger.exception("take-over failed; the lease will tell", extra={"worker_id": peer})

    async def __del__(self) -> None:
        await self._background.stop()
        await self._peers.close()
        await self._link.close()
        await self._http.close()
        await self._stores.close()

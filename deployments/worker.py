"""One workflow executor with all that it holds: its connections, its steps, its pulse.

Apart from the deployment, so that tests can run, and kill, the same worker without Ray.
"""

import asyncio
import logging
from collections.abc import Collection

from deployments.definitions import catalog_of, children_of
from deployments.events import carry_out_events, timekeeper_of
from deployments.webhooks import endings_of, guarded_http
from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_bells import RedisBells, worker_channels
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.adapters.tcp_peers import TcpPeers
from serve_app.core.errors import StoreUnavailableError
from serve_app.ports import Admission, Clock, Entropy
from serve_app.services.executor import Executor, WorkerLimits
from serve_app.services.inference import Inference
from serve_app.services.planner import Runtime
from serve_app.services.timekeeper import Timekeeper
from serve_app.settings import Settings
from serve_app.steps import step_types
from serve_app.steps.bounds import bounded

logger = logging.getLogger(__name__)


class Worker:
    """Composes one `Executor` and its `Timekeeper`.

    `begin` makes them; then run `executor`, `timekeeper` and `watch_peers`. `host` is where its
    peers reach it.
    """

    executor: Executor
    timekeeper: Timekeeper

    def __init__(
        self,
        settings: Settings,
        admission: Admission,
        clock: Clock,
        entropy: Entropy,
        host: str,
    ) -> None:
        self.stores = connect(settings, clock)
        self._settings = settings
        self._clock = clock
        self._entropy = entropy
        secret = settings.cluster_secret.get_secret_value().encode()
        self._link = TcpTokenLink(secret, clock, entropy)
        self._http = guarded_http(settings)
        inference = Inference(admission, self._link, clock, settings.resume_wait_s)
        types = bounded(
            step_types(
                inference,
                JsonSchemas(),
                entropy,
                self._http,
                settings.http_answer_max_bytes,
                children_of(settings, self.stores.calls, clock, lambda: self._catalog),
            ),
            settings.result_max_bytes,
        )
        self._catalog = catalog_of(self.stores.calls, types, clock)
        carry_out_events(settings, self.stores, self._catalog, clock)
        on_end = endings_of(settings, self.stores.calls, clock).outgoing
        self._runtime = Runtime(
            self.stores.store,
            types,
            CelExpressions(),
            clock,
            entropy,
            on_end,
            settings.result_max_bytes,
        )
        self._host = host
        self._peers = TcpPeers(host, clock)

    async def begin(self) -> None:
        """Open the pulse, whose port is in the worker's id."""
        settings = self._settings
        port = await self._peers.listen()
        # The id names where its peers can feel its pulse, so no directory has to.
        worker_id = f"{self._host}:{port}~{self._entropy.token()}"
        self._peers.worker_id = worker_id
        channels = worker_channels(worker_id, settings.partitions)
        self.executor = Executor(
            worker_id,
            self._runtime,
            RedisBells(self.stores.nodes, channels, self._clock),
            self._catalog,
            WorkerLimits(settings.lease_ttl_ms, settings.heartbeat_ms, settings.executor_capacity),
        )
        self.timekeeper = timekeeper_of(
            settings, self.stores, self._catalog, self._clock, worker_id
        )

    async def watch_peers(self) -> None:
        """Feel the pulse of every other worker, and take over from one that is lost."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_newcomers(group))
            while True:
                self._watch_all(await self.executor.peers_changed(), group)

    async def close(self) -> None:
        """Disconnect; the executor has ended before."""
        await self._peers.close()
        await self._link.close()
        await self._http.close()
        await self.stores.close()

    async def _watch_newcomers(self, group: asyncio.TaskGroup) -> None:
        """A worker that has just come may own something before our next heartbeat lists it."""
        while True:
            self._watch_all((await self._peers.greeted(),), group)

    def _watch_all(self, peers: Collection[str], group: asyncio.TaskGroup) -> None:
        for peer in self._peers.unwatched(peers):
            group.create_task(self._watch(peer))

    async def _watch(self, peer: str) -> None:
        if not await self._peers.is_lost(peer):
            return
        try:
            await self.executor.take_over(peer)
        except StoreUnavailableError:
            logger.exception("take-over failed; the lease will tell", extra={"worker_id": peer})

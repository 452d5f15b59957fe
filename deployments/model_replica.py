"""The model replica: one engine, its link, and its reports."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from ray import serve

from deployments.addresses import own_address
from deployments.background import Background
from serve_app.adapters.collector import set_aside_what_stays
from serve_app.adapters.engine_slot import EngineSlot
from serve_app.adapters.metrics import EngineMetrics
from serve_app.adapters.redis_connect import connect, metrics_of, redis_options
from serve_app.adapters.redis_replicas import RedisReplicas, announce_start
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link_server import TokenLinkServer
from serve_app.adapters.telemetry import configure_logging
from serve_app.adapters.vllm_engine import EngineSettings, VllmEngine
from serve_app.core.cores import cores_of
from serve_app.core.errors import StoreUnavailableError
from serve_app.core.inference import ReplicaLoad
from serve_app.core.routing import REPORT_TTL_MS, ReplicaReport
from serve_app.services.canary import sing
from serve_app.services.metering import MeteredEngine
from serve_app.settings import LOOPBACK_HOSTS, Settings

REPORTS_PER_S = 20  # at the most, where there is news; two without
LAST_LINES = 15
DRAIN_S = 5.0  # less than Serve's patience below

logger = logging.getLogger(__name__)


@serve.deployment(
    name="model_replica",
    max_ongoing_requests=1,
    ray_actor_options={"num_cpus": 0.5},
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=10,
)
class ModelReplica:
    """Starts the engine in its constructor, so that it is ready when Serve says so."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: Settings, engine_count: int
    ) -> None:
        """Args: engine_count: engines of all models."""
        configure_logging(settings.log_level, json=True, path=settings.log_path("model"))
        self._clock = SystemClock()
        self._replica_id = f"host-{SystemEntropy().token()[:10]}"
        self._models = settings.model_names
        store = redis_options(settings)
        announce_start(store, self._report("starting", "loading the model"))
        log_path = settings.data_dir / "logs" / f"engine-{self._replica_id}.log"
        _redirect_output(log_path)
        try:
            measures = EngineMetrics(self._models[0] if self._models else "")
            self._slot = EngineSlot()
            cores = _cores(settings, self._slot.index, engine_count)
            logger.info("engine starts", extra={"slot": self._slot.index, "cores": cores})
            engine_settings = _engine_settings(settings, cores)
            engine = VllmEngine.start(engine_settings, self._clock, measures.step_ended)
            announce_start(store, self._report("starting", "making the first tokens"))
            await sing(engine, is_embedding=engine.is_embedding)
        except Exception as error:
            detail = f"{_last_lines(log_path)}\n{type(error).__name__}: {error}".strip()
            announce_start(store, self._report("failed", detail))
            raise
        self._engine = MeteredEngine(
            engine,
            self._clock,
            region=settings.region,
            stake=settings.stake,
            slots=settings.engine_seqs_max,  # a batch: what is more waits where fairness is
            observe=measures.request_ended,
        )
        self._stores = connect(settings, self._clock)
        self._registry = RedisReplicas(self._stores.nodes, self._stores.calls, self._clock)
        secret = settings.cluster_secret.get_secret_value().encode()
        self._server = TokenLinkServer(
            self._engine, secret, self._replica_id, self._clock, SystemEntropy()
        )
        await self._server.start(own_address(settings))
        self._background = Background()
        self._background.start("reports", self._report_load())
        metrics = metrics_of(settings, self._stores, self._clock, f"model-{self._replica_id}")
        self._background.start("metrics", metrics.run())
        set_aside_what_stays()

    async def check_health(self) -> None:
        """Unhealthy when the engine is dead or stands still."""
        self._background.check()
        await self._engine.check_health()

    async def _report_load(self) -> None:
        while True:
            await self._announce("ready")
            for _ in range(REPORTS_PER_S // 2):
                await self._clock.sleep(1 / REPORTS_PER_S)
                if self._engine.has_news:
                    break

    async def _announce(self, phase: str) -> None:
        report = self._report(phase, load=self._server.load())
        await self._registry.announce(replace(report, news=self._engine.take_news()))

    async def _drain(self) -> None:
        """Hand the running answers to other replicas; with none to take them, wait a little.

        Whoever is then still there waits for the next replica (`Inference`), so nothing is lost.
        """
        await self._background.stop()
        give_up_s = self._clock.monotonic_s() + DRAIN_S
        try:
            await self._announce("draining")
            while self._server.stream_count and self._clock.monotonic_s() < give_up_s:
                if await self._has_heir():
                    break
                await self._clock.sleep(0.1)
        except StoreUnavailableError:
            logger.warning("drained without telling the routers: the store is away")
        count = self._server.hand_over()
        await self._clock.sleep(0)  # the last frames leave with this turn of the loop
        logger.info("drained", extra={"handed_over": count})

    async def _has_heir(self) -> bool:
        young_ms = self._clock.now_ms() - REPORT_TTL_MS
        return any(
            report.phase == "ready"
            and report.at_ms > young_ms
            and report.load.models == self._models
            for report in await self._registry.latest()
            if report.load.replica_id != self._replica_id
        )

    def _report(
        self, phase: str, detail: str = "", load: ReplicaLoad | None = None
    ) -> ReplicaReport:
        present = load or ReplicaLoad(self._replica_id, self._models, "", 0)
        return ReplicaReport(present, phase, detail, self._clock.now_ms())

    async def __del__(self) -> None:
        await self._drain()
        await self._server.close()
        await self._engine.stop()
        await self._registry.withdraw(self._replica_id)
        await self._stores.close()
        self._slot.close()


def _cores(settings: Settings, engine_index: int, engine_count: int) -> tuple[int, ...]:
    """The cores of this machine's `engine_index`-th engine.

    Where the links are bound to loopback all engines are on this machine; elsewhere one on a node
    is the rule, and the operator who has more sets `engine_threads`.
    """
    is_one_machine = settings.link_host in LOOPBACK_HOSTS
    cores = sorted(os.sched_getaffinity(0))
    here = engine_count if is_one_machine else 1
    return cores_of(cores, engine_index, here, settings.engine_threads)


def _engine_settings(settings: Settings, cores: tuple[int, ...]) -> EngineSettings:
    return EngineSettings(
        model_path=settings.model,
        served_names=settings.model_names,
        reasoning_parser=settings.reasoning_parser,
        runner=settings.model_runner,
        context_max=settings.context_max,
        kv_cache_gib=settings.kv_cache_gib,
        enforce_eager=settings.engine_eager,
        cpu_cores=cores,
        dtype=settings.dtype,
        device=settings.device,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_num_seqs=settings.engine_seqs_max,
        stall_after_s=settings.engine_stall_s,
    )


def _redirect_output(path: Path) -> None:
    """Send this process's output, and that of the engine processes it starts, to a file.

    What an engine says before it dies goes to its standard error alone; kept apart, its last
    lines can be shown to whoever started it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def _last_lines(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])

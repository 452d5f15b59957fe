"""The service without Ray: a store, executors and a hub in one event loop."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_bells import RedisBells, ingress_channels, worker_channels
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_gates import RedisGates
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_store import DEFAULT_LIMITS, RedisStore, StoreLimits
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.core.definition import parse_workflow
from serve_app.core.errors import UnknownWorkflowError
from serve_app.core.workflow import Workflow
from serve_app.ingress.views import render_sse
from serve_app.ports import StepType
from serve_app.services.executions import Executions
from serve_app.services.executor import Executor, WorkerLimits
from serve_app.services.feeds import Feeds
from serve_app.services.flow import Flow, FlowLimits
from serve_app.services.planner import OnEnd, Runtime, tell_nobody
from serve_app.steps.echo import ECHO
from serve_app.steps.transform import TRANSFORM

PARTITIONS = 4


@dataclass
class StaticCatalog:
    """Definitions held in memory, version 1 each."""

    workflows: Mapping[str, Workflow]

    async def latest(self, workspace: str, workflow_id: str) -> tuple[int, Workflow]:
        if workflow_id not in self.workflows:
            raise UnknownWorkflowError(f"no workflow {workflow_id!r} in this workspace")
        return 1, self.workflows[workflow_id]

    async def version(self, workspace: str, workflow_id: str, version: int) -> Workflow:
        return self.workflows[workflow_id]


@dataclass
class Harness:
    """What a test needs of a running service."""

    url: str
    step_types: dict[str, StepType] = field(default_factory=dict)
    definitions: list[dict[str, object]] = field(default_factory=list)
    limits: WorkerLimits = field(
        default_factory=lambda: WorkerLimits(lease_ttl_ms=1500, heartbeat_ms=200)
    )
    backlog_max: int = 1000
    retention_ms: int = 600_000
    ack_replicas: int = 0
    store_limits: StoreLimits = DEFAULT_LIMITS
    on_end: OnEnd = tell_nobody

    def __post_init__(self) -> None:
        self.clock, self.entropy = SystemClock(), SystemEntropy()
        self.expressions, self.schemas = CelExpressions(), JsonSchemas()
        self.step_types = {"echo": ECHO, "transform": TRANSFORM, **self.step_types}
        self.catalog = StaticCatalog({str(d["id"]): self.parse(d) for d in self.definitions})
        self.calls: list[RedisCalls] = []
        self.executors: dict[str, tuple[Executor, asyncio.Task[None]]] = {}

    def parse(self, definition: object) -> Workflow:
        return parse_workflow(
            definition,
            check_expression=self.expressions.check,
            check_schema=self.schemas.check,
            step_checks={name: kind.check for name, kind in self.step_types.items()},
        )

    def connect(self) -> tuple[RedisNodes, RedisStore]:
        nodes = RedisNodes(RedisOptions(tuple(self.url.split(",")), ack_replicas=self.ack_replicas))
        calls = RedisCalls(nodes, self.clock)
        store = RedisStore(
            calls,
            partition_count=PARTITIONS,
            backlog_max=self.backlog_max,
            retention_ms=self.retention_ms,
            limits=self.store_limits,
        )
        self.calls.append(calls)
        return nodes, store

    async def start_executor(self, name: str) -> Executor:
        nodes, store = self.connect()
        runtime = Runtime(
            store, self.step_types, self.expressions, self.clock, self.entropy, self.on_end
        )
        bells = RedisBells(nodes, worker_channels(name, PARTITIONS), self.clock)
        executor = Executor(name, runtime, bells, self.catalog, self.limits)
        self.executors[name] = (executor, asyncio.ensure_future(executor.run()))
        while not executor.beat_at_s:
            await asyncio.sleep(0.005)
        return executor

    async def stop_executor(self, name: str) -> None:
        _, task = self.executors.pop(name)
        task.cancel()
        await asyncio.wait((task,))

    @asynccontextmanager
    async def surface(self, name: str = "ingress") -> AsyncIterator[tuple[Executions, Feeds]]:
        nodes, store = self.connect()
        bells = RedisBells(nodes, ingress_channels(name, PARTITIONS), self.clock)
        feeds = Feeds(name, store, bells, self.clock, render_sse)
        executions = Executions(
            store,
            self.catalog,
            self.schemas,
            feeds,
            self.clock,
            self.entropy,
            flow=Flow(
                RedisGates(store._calls, partition_count=PARTITIONS),
                self.expressions,
                self.clock,
                FlowLimits(waiting_max=100, ahead_max_ms=60_000),
            ),
            timeout_default_ms=600_000,
        )
        running = asyncio.ensure_future(feeds.run())
        await asyncio.sleep(0.05)
        try:
            yield executions, feeds
        finally:
            running.cancel()
            await asyncio.wait((running,))

    async def close(self) -> None:
        for name in list(self.executors):
            await self.stop_executor(name)
        for calls in self.calls:
            await calls.close()

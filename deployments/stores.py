"""Redis parts that several deployments build in the same way."""

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import yaml
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import SHIPPED, RedisCatalog
from serve_app.adapters.redis_store import RedisStore
from serve_app.adapters.system import SystemClock
from serve_app.core.errors import InvalidWorkflowError
from serve_app.core.workflow import Workflow, parse_workflow
from serve_app.ports import StepType
from serve_app.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

ANSWER_TIMEOUT_S = 5.0  # of the server; a stuck one is treated as lost


@dataclass(frozen=True, slots=True)
class Stores:
    """The connections of one process."""

    client: Redis
    calls: RedisCalls
    store: RedisStore

    async def close(self) -> None:
        """Finish the calls under way and disconnect."""
        await self.calls.close()
        await self.client.aclose()


def connect(settings: Settings, clock: SystemClock) -> Stores:
    """Connections to the store; they open with their first use."""
    calls = RedisCalls(redis_client(settings, timeout_s=ANSWER_TIMEOUT_S), clock)
    store = RedisStore(
        calls,
        partition_count=settings.partitions,
        backlog_max=settings.backlog_max,
        retention_ms=settings.retention_s * 1000,
    )
    # Subscriptions wait without end for their next message, so their client has no time-out.
    return Stores(redis_client(settings, timeout_s=None), calls, store)


def redis_client(settings: Settings, *, timeout_s: float | None) -> Redis:
    """A client that does not retry by itself: `RedisCalls` and the bells know better."""
    client: Redis = Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=timeout_s,
        socket_connect_timeout=ANSWER_TIMEOUT_S,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
    )
    return client


def catalog_of(
    calls: RedisCalls, step_types: "Mapping[str, StepType]", clock: SystemClock
) -> RedisCatalog:
    """The catalog with our expression language, schemas and step types behind its checks."""
    expressions, schemas = CelExpressions(), JsonSchemas()

    def parse(document: object) -> Workflow:
        return parse_workflow(
            document,
            check_expression=expressions.check,
            check_schema=schemas.check,
            step_checks={name: kind.check for name, kind in step_types.items()},
        )

    return RedisCatalog(calls, parse, clock)


async def publish_definitions(catalog: RedisCatalog, settings: Settings) -> None:
    """Make shipped definitions and the operator's own known; unchanged ones keep their version.

    Raises:
        InvalidWorkflowError: a file holds no workflow; the message names the file.
    """
    own = settings.workflows_dir
    sources = [(SHIPPED, resources.files("workflows"))]
    sources += [(settings.workspace_id, own)] if own is not None else []
    for workspace, folder in sources:
        for file in sorted(folder.iterdir(), key=str):
            if file.name.endswith(".yaml"):
                document = yaml.safe_load(file.read_text(encoding="utf-8"))
                try:
                    await catalog.define(workspace, document)
                except InvalidWorkflowError as error:
                    raise InvalidWorkflowError(f"{file.name}: {error}", error.problems) from error

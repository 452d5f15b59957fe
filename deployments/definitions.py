"""Definitions: the catalog with all its checks, and what is published at start."""

from collections.abc import Callable, Mapping
from importlib import resources

import yaml

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.cronsim_schedules import CronSchedules
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import SHIPPED, RedisCatalog
from serve_app.adapters.redis_gates import RedisGates
from serve_app.core.definition import parse_workflow
from serve_app.core.errors import InvalidWorkflowError
from serve_app.core.workflow import Workflow
from serve_app.ports import Clock, StepType, WorkflowCatalog
from serve_app.services.children import Children
from serve_app.services.flow import Flow, FlowLimits
from serve_app.settings import Settings

# Shipped under a second name too, because both are in use.
ALIASES = {"document-analysis": ("document-processing",)}


def catalog_of(calls: RedisCalls, step_types: Mapping[str, StepType], clock: Clock) -> RedisCatalog:
    """The catalog with our expression language, schemas and step types behind its checks."""
    expressions, schemas = CelExpressions(), JsonSchemas()

    def parse(document: object) -> Workflow:
        return parse_workflow(
            document,
            check_expression=expressions.check,
            check_schema=schemas.check,
            step_checks={name: kind.check for name, kind in step_types.items()},
            check_schedule=CronSchedules().check,
        )

    return RedisCatalog(calls, parse, clock)


def children_of(
    settings: Settings,
    calls: RedisCalls,
    clock: Clock,
    catalog: Callable[[], WorkflowCatalog],
) -> Children:
    """What starts workflows from steps."""
    return Children(
        catalog,
        JsonSchemas(),
        flow_of(settings, calls, clock),
        clock,
        partition_count=settings.partitions,
        timeout_default_ms=settings.timeout_default_ms,
    )


def flow_of(settings: Settings, calls: RedisCalls, clock: Clock) -> Flow:
    """When accepted executions may start."""
    gates = RedisGates(calls, partition_count=settings.partitions)
    limits = FlowLimits(settings.flow_waiting_max, settings.flow_ahead_s * 1000)
    return Flow(gates, CelExpressions(), clock, limits)


async def publish_definitions(catalog: WorkflowCatalog, settings: Settings) -> None:
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
                for alias in ALIASES.get(document["id"], ()) if workspace == SHIPPED else ():
                    await catalog.define(workspace, {**document, "id": alias})

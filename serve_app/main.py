"""The composition root: settings in, bound Serve application out. The only place that knows all.

Owns the graph of deployments. `serve run serve_app.main:build_app` and `cluster.yaml` come in
here; `inferpipe up` too.
"""

from typing import cast

from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from deployments.ingress import Ingress
from deployments.model_replica import ModelReplica
from deployments.router import RouterDeployment
from deployments.webhook_dispatcher import WebhookDispatcher
from deployments.workflow_executor import WorkflowExecutor
from serve_app.settings import Settings

APP_NAME = "inferpipe"


def build_app(settings: Settings) -> Application:
    """The application.

    Args:
        settings: with `redis_url`, `cluster_secret`, `api_key` and the model resolved; Serve
            passes the `args` of a config file through this type.

    Raises:
        ValueError: one of these is missing.
    """
    for name in ("redis_url", "cluster_secret", "api_key"):
        if not getattr(settings, name).get_secret_value():
            raise ValueError(f"INFERPIPE_{name.upper()} must be set where `inferpipe up` does not")
    router = _deployment(RouterDeployment).options(num_replicas=settings.router_replicas)
    if settings.router_replicas > 1:
        router = router.options(request_router_config=one_router_per_model())
    bound_router = router.bind(settings)
    executor = (
        _deployment(WorkflowExecutor)
        .options(num_replicas=settings.executor_replicas)
        .bind(settings, bound_router)
    )
    deployed = [executor]
    if settings.dispatcher_replicas:
        deployed.append(
            _deployment(WebhookDispatcher)
            .options(num_replicas=settings.dispatcher_replicas)
            .bind(settings)
        )
    # First in the list: the engines take longest to start.
    deployed[:0] = _engines(settings)
    ingress = _deployment(Ingress).options(
        num_replicas=settings.ingress_replicas, max_ongoing_requests=settings.requests_max
    )
    return ingress.bind(settings, bound_router, tuple(deployed))


def _engines(settings: Settings) -> list[Application]:
    """A deployment for each model."""
    models = settings.of_each_model()
    engine_count = sum(one.model_replicas for one in models)
    return [
        _deployment(ModelReplica)
        .options(
            name="model_replica" if index == 0 else f"model_replica_{index + 1}",
            num_replicas=one.model_replicas,
        )
        .bind(one, engine_count)
        for index, one in enumerate(models)
    ]


def one_router_per_model() -> RequestRouterConfig:
    """Calls go by the hash of their session id, which `ServeAdmission` sets to the model.

    So queues, shares and prefixes of a model are in one place, however many routers there are.
    """
    return RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"  # type: ignore[arg-type]
    )


def _deployment(decorated: object) -> Deployment:
    """What `@serve.deployment` makes of a class; its annotations do not say so."""
    return cast(Deployment, decorated)

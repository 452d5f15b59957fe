"""`GET /metrics`: Prometheus's text format, for the operator.

Owns who may read it: anybody where the service is bound to loopback or the setting opens it, else
an admin key of the first workspace, because the numbers are those of all tenants together.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.core.auth import Scope
from serve_app.core.errors import ForbiddenError
from serve_app.ingress.answers import ERRORS
from serve_app.ingress.app import services_of

router = APIRouter(tags=["health"])

_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **ERRORS,
        200: {"content": {_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}},
    },
    summary="Prometheus metrics of all processes",
)
async def metrics(request: Request) -> Response:
    """Ours begin with `inferpipe_`, the engines' with `vllm:`; `process` tells processes apart."""
    services = services_of(request)
    settings = services.settings
    if not (settings.metrics_open or settings.is_loopback):
        principal = await services.authenticator.principal(request, Scope.ADMIN)
        if principal.workspace != settings.workspace_id:
            raise ForbiddenError("metrics are for an admin of the first workspace")
    return Response(await services.metrics_page.page(), media_type=_TYPE)

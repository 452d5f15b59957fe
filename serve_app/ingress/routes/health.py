"""Health: no key, no work; the answer is the last sample."""

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import HealthStatus
from serve_app.ingress.app import services_of

router = APIRouter(tags=["health"])


def _plain(value: object) -> object:
    """Read-only mappings as dictionaries, for the encoder."""
    return dict(value)  # type: ignore[call-overload]


@router.get(
    "/v1/health",
    response_model=HealthStatus,
    responses={503: {"model": HealthStatus, "description": "Something needed is not up"}},
    summary="What is up and what is not",
)
@router.get("/health", response_model=HealthStatus, include_in_schema=False)
async def health(request: Request) -> Response:
    """200 when everything needed is up, 503 otherwise."""
    services = services_of(request)
    sample = services.health.sample
    body = {
        "status": sample.status,
        "version": services.version,
        "services": sample.services,
    }
    status = 200 if sample.status == "healthy" else 503
    return Response(orjson.dumps(body, default=_plain), status, None, "application/json")

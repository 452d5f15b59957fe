"""`/v1/hosts`: the model replicas, for clients that choose one for themselves.

Owns what a host looks like. Changes nothing. Invariant: an `apiUrl` is absolute and leads to this
ingress, which reaches every host.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import HostList, HostRequirements, HostView
from serve_app.core.auth import Scope
from serve_app.core.inference import Placement
from serve_app.core.routing import ReplicaReport
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import services_of
from serve_app.ingress.bodies import read_json, validate
from serve_app.ingress.openapi import described

router = APIRouter(prefix="/v1/hosts", tags=["hosts"])

BODY_BYTES_MAX = 16 * 1024
_SECURE = {"https": "wss", "wss": "wss"}


@router.get("", response_model=HostList, responses=ERRORS, summary="The model replicas")
async def list_hosts(request: Request) -> Response:
    """Ready ones first; one that starts, failed or fell silent is shown for a while."""
    services = services_of(request)
    await services.authenticator.principal(request, Scope.READ)
    base_url = _base_url(request, services.settings.public_url)
    hosts = [_view(report, base_url) for report in await services.hosts.all()]
    return json_response({"hosts": hosts})


@router.post(
    "/select",
    response_model=HostView,
    responses=ERRORS,
    openapi_extra=described(
        HostRequirements,
        example={"model": "SmolLM2-135M-Instruct", "maxLatency": 2000, "region": "eu"},
    ),
    summary="The best host",
)
async def select_host(request: Request) -> Response:
    """By model, stake and latency, which must hold, and region, where it can be had."""
    services = services_of(request)
    await services.authenticator.principal(request, Scope.READ)
    wish = validate(HostRequirements, await read_json(request, services.settings, BODY_BYTES_MAX))
    placement = Placement(
        max_latency_ms=wish.max_latency,
        min_stake=wish.min_stake or "",
        region=wish.region or "",
    )
    chosen = await services.hosts.select(wish.model, placement)
    return json_response(_view(chosen, _base_url(request, services.settings.public_url)))


def _base_url(request: Request, public_url: str) -> str:
    """Where clients reach us, as a WebSocket address without a slash at its end."""
    if public_url:
        scheme, _, rest = public_url.rstrip("/").partition("://")
        return f"{_SECURE.get(scheme, 'ws')}://{rest}"
    return f"{_SECURE.get(request.url.scheme, 'ws')}://{request.url.netloc}"


def _view(report: ReplicaReport, base_url: str) -> dict[str, object]:
    load = report.load
    return {
        "id": load.replica_id,
        "apiUrl": f"{base_url}/hosts/{load.replica_id}",
        "models": list(load.models),
        "region": load.region,
        "stake": load.stake,
        "status": report.phase,
        "latencyMs": round(load.ttft_ms, 2) if load.ttft_ms else None,
        "load": load.running_count,
        "queuedTokens": load.queued_tokens,
        "kvUsage": round(load.kv_usage, 4),
    }

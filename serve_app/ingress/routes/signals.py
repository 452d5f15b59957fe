"""`POST /v1/executions/{id}/signal`: what a waiting step is told.

Owns the translation between the wire and `services.executions`. Invariant: under one
Idempotency-Key a signal is received once.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import ExecutionInfo, SignalRequest
from serve_app.core.auth import Scope
from serve_app.ingress.answers import ERRORS
from serve_app.ingress.app import services_of
from serve_app.ingress.bodies import read_json, validate
from serve_app.ingress.idempotency import answer_once
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, described

router = APIRouter(prefix="/v1", tags=["executions"])


@router.post(
    "/executions/{execution_id}/signal",
    status_code=202,
    response_model=ExecutionInfo,
    responses=ERRORS,
    openapi_extra=described(
        SignalRequest,
        example={"name": "ask", "data": {"approved": True}},
        headers=(IDEMPOTENCY_KEY,),
    ),
    summary="Answer a step that waits, or will",
)
async def signal_execution(request: Request, execution_id: str) -> Response:
    """A step takes the signal whose name is its id, its path or the event it waits for."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.EXECUTE)
    settings = services.settings
    value = await read_json(request, settings, settings.signal_max_bytes)
    wish = validate(SignalRequest, value)

    async def make() -> dict[str, object]:
        signalled = await services.executions.signal(
            principal.workspace, execution_id, wish.name, wish.data
        )
        return {"id": signalled.id, "status": signalled.status}

    return await answer_once(request, principal.workspace, value, make, status=202)

"""`/hooks/…`: webhooks come in; `/v1/workflows/{id}/hook`: the secret they are signed with.

Owns the translation between the wire and `services.hooks`. Invariant: what is wrong with a delivery
is never told apart; a secret is in the answer that made it and in no other.
"""

from collections.abc import Mapping

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import HookDelivery, HookRequest, HookView
from serve_app.core.auth import Scope
from serve_app.core.webhooks import OVERLAP_DEFAULT_MS
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import services_of
from serve_app.ingress.bodies import parse_json, read_body, validate
from serve_app.ingress.idempotency import answer_once
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, described
from serve_app.services.hooks import Delivery

router = APIRouter(tags=["hooks"])

_SECRET_BODY_MAX = 4096
_EXAMPLE = {"secret": "what-the-sender-has-made"}


@router.post(
    "/hooks/{workspace}/{workflow_id}",
    status_code=202,
    response_model=HookDelivery,
    responses=ERRORS,
    openapi_extra=described({"type": ["object", "array"]}, example={"action": "opened"}),
    summary="A webhook comes in",
)
async def receive_hook(request: Request, workspace: str, workflow_id: str) -> Response:
    """No key: the signature says who sends. The body is the input of the execution it starts."""
    services = services_of(request)
    settings = services.settings
    body = await read_body(request, settings.event_max_bytes)
    headers = {name.lower(): value for name, value in request.headers.items()}
    event_id = await services.hooks.receive(
        Delivery(workspace, workflow_id, headers, body),
        lambda raw: parse_json(raw, settings.json_depth_max),  # type: ignore[arg-type,return-value] # JSON
    )
    return json_response({"id": event_id}, 202)


@router.post(
    "/v1/workflows/{workflow_id}/hook",
    status_code=201,
    response_model=HookView,
    responses=ERRORS,
    openapi_extra=described(
        HookRequest, example=_EXAMPLE, is_required=False, headers=(IDEMPOTENCY_KEY,)
    ),
    summary="Give a workflow's hook a secret",
)
async def set_hook_secret(request: Request, workflow_id: str) -> Response:
    """A new one, or the sender's own; the present one counts on for the overlap."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    body = await read_body(request, _SECRET_BODY_MAX)
    value = parse_json(body, services.settings.json_depth_max) if body else {}
    wish = validate(HookRequest, value)
    overlap_ms = OVERLAP_DEFAULT_MS if wish.overlap is None else wish.overlap

    async def make() -> Mapping[str, object]:
        secret = await services.hooks.set_secret(
            principal.workspace, workflow_id, wish.secret, overlap_ms
        )
        base = services.settings.public_url.rstrip("/") or str(request.base_url).rstrip("/")
        return {"url": f"{base}/hooks/{principal.workspace}/{workflow_id}", "secret": secret}

    return await answer_once(request, principal.workspace, value, make, secrets=("secret",))


@router.delete(
    "/v1/workflows/{workflow_id}/hook",
    status_code=204,
    responses=ERRORS,
    summary="Take a hook's secret away",
)
async def delete_hook_secret(request: Request, workflow_id: str) -> Response:
    """From then on the hook takes nothing."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    await services.hooks.drop_secret(principal.workspace, workflow_id)
    return Response(status_code=204)

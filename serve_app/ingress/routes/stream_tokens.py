"""`/v1/stream-tokens`: a browser's way to a stream, as `EventSource` can send no header.

Owns how long a token lasts. Invariant: a token never says more than the key that asked for it.
"""

from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import StreamTokenRequest, StreamTokenView
from serve_app.core.auth import Scope
from serve_app.core.errors import ForbiddenError, InvalidRequestError, Problem
from serve_app.core.stream_tokens import scope_of_resource, seal
from serve_app.ingress.answers import ERRORS
from serve_app.ingress.app import services_of
from serve_app.ingress.bodies import read_json, validate
from serve_app.ingress.idempotency import answer_once
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, described
from serve_app.ingress.views import timestamp

router = APIRouter(prefix="/v1", tags=["keys"])

BODY_BYTES_MAX = 16 * 1024
TTL_DEFAULT_S = 300


@router.post(
    "/stream-tokens",
    status_code=201,
    response_model=StreamTokenView,
    responses=ERRORS,
    openapi_extra=described(
        StreamTokenRequest,
        example={"resource": "/stream/user/u1", "ttl": 300},
        headers=(IDEMPOTENCY_KEY,),
    ),
    summary="A short-lived token for one stream",
)
async def create_stream_token(request: Request) -> Response:
    """Send it as `?token=` to exactly the path it names."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    body = await read_json(request, services.settings, BODY_BYTES_MAX)
    wish = validate(StreamTokenRequest, body)
    ttl_max_s = services.settings.stream_token_ttl_max_s
    ttl_s = wish.ttl or min(TTL_DEFAULT_S, ttl_max_s)
    if ttl_s > ttl_max_s:
        problem = Problem(("body", "ttl"), f"at most {ttl_max_s} seconds")
        raise InvalidRequestError("the token would last too long", [problem])
    scope = scope_of_resource(wish.resource)
    if not principal.can(scope):
        raise ForbiddenError(f"this key has the scope {principal.scope}; {scope} is needed")

    async def make() -> dict[str, object]:
        secret = services.settings.cluster_secret.get_secret_value().encode()
        expires_at_ms = services.clock.now_ms() + ttl_s * 1000
        token = seal(secret, replace(principal, scope=scope), wish.resource, expires_at_ms)
        return {"token": token, "expiresAt": timestamp(expires_at_ms)}

    return await answer_once(request, principal.workspace, body, make, secrets=("token",))

"""`/v1/sessions`: conversations that are kept; their turns are spoken on `/v1/ws`.

Owns beginning, showing and ending them. Invariant: another workspace's session is as unknown as
one that never was.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import SessionMessageList, SessionRequest, SessionView
from serve_app.core.auth import Scope
from serve_app.core.errors import InvalidCursorError
from serve_app.core.session import Session
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import services_of
from serve_app.ingress.bodies import read_json, validate
from serve_app.ingress.idempotency import answer_once
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, described
from serve_app.ingress.queries import whole_number
from serve_app.ingress.views import timestamp

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

BODY_BYTES_MAX = 512 * 1024  # a system message of the longest, escaped
PAGE_DEFAULT = 50
PAGE_MAX = 200
CURSOR_DIGITS_MAX = 9


@router.post(
    "",
    status_code=201,
    response_model=SessionView,
    responses=ERRORS,
    openapi_extra=described(
        SessionRequest,
        example={"model": "SmolLM2-135M-Instruct", "system": "You answer in one sentence."},
        headers=(IDEMPOTENCY_KEY,),
    ),
    summary="Begin a session",
)
async def create_session(request: Request) -> Response:
    """Its turns are the `inference` messages that name it."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.EXECUTE)
    body = await read_json(request, services.settings, BODY_BYTES_MAX)
    wish = validate(SessionRequest, body)

    async def make() -> dict[str, object]:
        await services.hosts.check_model(wish.model)
        session = await services.sessions.create(principal.workspace, wish.model, wish.system or "")
        return _view(session, services.sessions.limits.idle_ms)

    return await answer_once(request, principal.workspace, body, make)


@router.get("/{session_id}", response_model=SessionView, responses=ERRORS, summary="One session")
async def read_session(request: Request, session_id: str) -> Response:
    """Without its messages."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    session = await services.sessions.find(principal.workspace, session_id)
    return json_response(_view(session, services.sessions.limits.idle_ms))


@router.delete("/{session_id}", status_code=204, responses=ERRORS, summary="End a session")
async def end_session(request: Request, session_id: str) -> Response:
    """All it holds is forgotten; a turn that is running ends too."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.EXECUTE)
    await services.sessions.end(principal.workspace, session_id)
    return Response(status_code=204)


@router.get(
    "/{session_id}/messages",
    response_model=SessionMessageList,
    responses=ERRORS,
    openapi_extra=described(
        query={
            "cursor": ({"type": "string", "pattern": "^[0-9]{1,9}$"}, "A page's `nextCursor`."),
            "limit": (
                {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT},
                "Messages on a page.",
            ),
        }
    ),
    summary="What was said",
)
async def list_messages(request: Request, session_id: str) -> Response:
    """The system message first, then the turns; `?cursor=` and `?limit=` page through them."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    cursor = request.query_params.get("cursor", "0")
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= CURSOR_DIGITS_MAX):
        raise InvalidCursorError("the cursor is none of ours")
    start, size = int(cursor), whole_number(request, "limit", PAGE_DEFAULT, 1, PAGE_MAX)
    session = await services.sessions.find(principal.workspace, session_id)
    found = await services.sessions.messages(session, start, size + 1)
    items = [
        {"role": said.role, "content": said.content, "createdAt": timestamp(said.at_ms)}
        for said in found[:size]
    ]
    next_cursor = str(start + size) if len(found) > size else None
    return json_response({"items": items, "nextCursor": next_cursor})


def _view(session: Session, idle_ms: int) -> dict[str, object]:
    return {
        "id": session.id,
        "model": session.model,
        "system": session.system or None,
        "messageCount": session.message_count + bool(session.system),
        "createdAt": timestamp(session.created_at_ms),
        "lastUsedAt": timestamp(session.used_at_ms),
        "expiresAt": timestamp(session.used_at_ms + idle_ms),
    }

"""`/v1/keys` and `/v1/workspaces`: who may call, and on whose behalf.

Owns making, showing and revoking keys. Invariant: a key is in one answer, the one that made it,
and nowhere else: not in the store, not in a log.
"""

from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import (
    KeyList,
    KeyRequest,
    KeyView,
    WorkspaceList,
    WorkspaceRequest,
    WorkspaceView,
)
from serve_app.core.auth import SHOWN_CHARACTERS, KeyRecord, Principal, Scope, new_key
from serve_app.core.errors import (
    ForbiddenError,
    InvalidRequestError,
    Problem,
    UnknownKeyError,
    WorkspaceExistsError,
)
from serve_app.core.limits import WINDOW_MS_MAX, Limit, Limits
from serve_app.core.workflow import parse_duration_ms
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import Services, services_of
from serve_app.ingress.bodies import read_json, validate
from serve_app.ingress.idempotency import answer_once
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, described
from serve_app.ingress.views import timestamp
from serve_app.ports import Clock

router = APIRouter(prefix="/v1", tags=["keys"])

BODY_BYTES_MAX = 16 * 1024
TOKEN_WINDOW_MS = 60_000  # of a bare number of tokens, where no other window is named


@router.post(
    "/keys",
    status_code=201,
    response_model=KeyView,
    responses=ERRORS,
    openapi_extra=described(
        KeyRequest,
        example={
            "name": "nightly job",
            "scopes": ["execute"],
            "rateLimit": {"requests": 100, "window": "60s"},
            "tokenLimit": {"tokens": 200_000, "window": "1d"},
        },
        headers=(IDEMPOTENCY_KEY,),
    ),
    summary="Make a key",
)
async def create_key(request: Request) -> Response:
    """In the caller's own workspace; the key is shown here and never again."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    body = await read_json(request, services.settings, BODY_BYTES_MAX)
    wish = validate(KeyRequest, body)

    async def make() -> dict[str, object]:
        scopes = tuple(Scope(scope) for scope in dict.fromkeys(wish.scopes))
        key, record = _new_record(services, principal.workspace, wish.name, scopes)
        record = replace(
            record, expires_at_ms=_expires_at_ms(wish, services.clock), limits=_limits(wish)
        )
        await services.keys.put(key, record)
        return {**_key_view(record), "key": key}

    return await answer_once(request, principal.workspace, body, make, secrets=("key",))


@router.get("/keys", response_model=KeyList, responses=ERRORS, summary="The workspace's keys")
async def list_keys(request: Request) -> Response:
    """Without the keys themselves."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    records = await services.keys.records(principal.workspace)
    return json_response({"items": [_key_view(record) for record in records], "nextCursor": None})


@router.delete("/keys/{key_id}", status_code=204, responses=ERRORS, summary="Revoke a key")
async def revoke_key(request: Request, key_id: str) -> Response:
    """Effective everywhere within a second."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    if not await services.keys.revoke(principal.workspace, key_id):
        raise UnknownKeyError(f"no key {key_id!r} in this workspace")
    return Response(status_code=204)


@router.post(
    "/workspaces",
    status_code=201,
    response_model=WorkspaceView,
    responses=ERRORS,
    openapi_extra=described(WorkspaceRequest, example={"id": "team-a"}, headers=(IDEMPOTENCY_KEY,)),
    summary="Make a workspace and its first admin key",
)
async def create_workspace(request: Request) -> Response:
    """For an admin of the first workspace; the key is shown here and never again."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    _check_operator(services, principal)
    body = await read_json(request, services.settings, BODY_BYTES_MAX)
    wish = validate(WorkspaceRequest, body)

    async def make() -> dict[str, object]:
        # The key first: a crash between the two leaves a key that nobody knows, and not a
        # workspace that nobody can enter.
        key, record = _new_record(services, wish.id, "first key", (Scope.ADMIN,))
        await services.keys.put(key, record)
        if not await services.keys.add_workspace(wish.id, wish.name or wish.id):
            await services.keys.revoke(wish.id, record.id)
            raise WorkspaceExistsError(f"there is a workspace {wish.id!r} already")
        return {"id": wish.id, "name": wish.name or wish.id, "apiKey": key}

    return await answer_once(request, principal.workspace, body, make, secrets=("apiKey",))


@router.get("/workspaces", response_model=WorkspaceList, responses=ERRORS, summary="All workspaces")
async def list_workspaces(request: Request) -> Response:
    """For an admin of the first workspace."""
    services = services_of(request)
    _check_operator(services, await services.authenticator.principal(request, Scope.ADMIN))
    found = await services.keys.workspaces()
    items = [
        {"id": workspace, "name": name, "createdAt": timestamp(at_ms)}
        for workspace, (name, at_ms) in found.items()
    ]
    return json_response({"items": items, "nextCursor": None})


def _check_operator(services: Services, principal: Principal) -> None:
    if principal.workspace != services.settings.workspace_id:
        raise ForbiddenError("workspaces are made with an admin key of the first workspace")


def _expires_at_ms(wish: KeyRequest, clock: Clock) -> int | None:
    if wish.expires_at is None:
        return None
    expires_at_ms = int(wish.expires_at.timestamp() * 1000)
    if expires_at_ms <= clock.now_ms():
        problem = Problem(("body", "expiresAt"), "a time to come")
        raise InvalidRequestError("expiresAt is in the past", [problem])
    return expires_at_ms


def _limits(wish: KeyRequest) -> Limits:
    requests, tokens = None, None
    if wish.rate_limit is not None:
        requests = _limit(wish.rate_limit.requests, wish.rate_limit.window, "rateLimit")
    if isinstance(wish.token_limit, int):
        tokens = Limit(wish.token_limit, requests.window_ms if requests else TOKEN_WINDOW_MS)
    elif wish.token_limit is not None:
        tokens = _limit(wish.token_limit.tokens, wish.token_limit.window, "tokenLimit")
    return Limits(requests, tokens)


def _limit(count_max: int, window: int | str, member: str) -> Limit:
    loc = ("body", member, "window")
    try:
        window_ms = parse_duration_ms(window)
    except ValueError as error:
        raise InvalidRequestError("a window is a duration", [Problem(loc, str(error))]) from error
    if window_ms > WINDOW_MS_MAX:
        raise InvalidRequestError("the window is too long", [Problem(loc, "at most 31d")])
    return Limit(count_max, window_ms)


def _new_record(
    services: Services, workspace: str, name: str, scopes: tuple[Scope, ...]
) -> tuple[str, KeyRecord]:
    key = new_key(services.entropy.token())
    record = KeyRecord(
        id=f"key_{services.entropy.token()}",
        workspace=workspace,
        name=name,
        scopes=scopes,
        prefix=key[:SHOWN_CHARACTERS],
        created_at_ms=services.clock.now_ms(),
    )
    return key, record


def _key_view(record: KeyRecord) -> dict[str, object]:
    expires_at_ms = record.expires_at_ms
    requests, tokens = record.limits.requests, record.limits.tokens
    return {
        "id": record.id,
        "name": record.name,
        "prefix": record.prefix,
        "scopes": list(record.scopes),
        "createdAt": timestamp(record.created_at_ms),
        "expiresAt": None if expires_at_ms is None else timestamp(expires_at_ms),
        "rateLimit": requests and {"requests": requests.count_max, "window": requests.window_ms},
        "tokenLimit": tokens and {"tokens": tokens.count_max, "window": tokens.window_ms},
    }

"""`/v1/webhooks` and `/v1/deliveries`: configure endpoints, look at what was sent, send it again.

Owns the translation between the wire and `services.webhooks`. Invariant: a secret is in the answer
that made it and in no other; header values, which may be credentials, are shown to admins alone.
"""

from typing import TypeVar

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import (
    DeliveryList,
    DeliveryView,
    Replayed,
    ReplayRequest,
    RotateSecretRequest,
    WebhookList,
    WebhookPatch,
    WebhookRequest,
    WebhookSecret,
    WebhookView,
)
from serve_app.core.auth import Scope
from serve_app.core.delivery import Delivery, DeliveryStatus
from serve_app.core.errors import InvalidCursorError, InvalidRequestError, Problem
from serve_app.core.webhooks import OVERLAP_DEFAULT_MS
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import Services, services_of
from serve_app.ingress.bodies import parse_json, read_body, validate
from serve_app.ingress.idempotency import answer_once
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, described
from serve_app.ingress.queries import whole_number
from serve_app.ingress.views import timestamp
from serve_app.ports import DeliveryQuery
from serve_app.services.webhooks import Shown, WebhookWish

router = APIRouter(prefix="/v1", tags=["webhooks"])

BODY_BYTES_MAX = 64 * 1024
LIST_DEFAULT, LIST_MAX = 50, 200
HIDDEN = "…"

Model = TypeVar("Model", bound=BaseModel)


@router.post(
    "/webhooks",
    status_code=201,
    response_model=WebhookView,
    responses=ERRORS,
    openapi_extra=described(
        WebhookRequest,
        example={"url": "https://example.com/hook", "events": ["workflow.completed"]},
        headers=(IDEMPOTENCY_KEY,),
    ),
    summary="Make a webhook",
)
async def create_webhook(request: Request) -> Response:
    """The secret is shown here and never again."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    body = await _body(request, services)
    wish = validate(WebhookRequest, body)

    async def make() -> dict[str, object]:
        shown = await services.webhooks.create(
            principal.workspace,
            WebhookWish(
                url=wish.url,
                events=wish.events,
                modes=wish.modes,
                workflow_id=wish.workflow_id,
                description=wish.description,
                headers=wish.headers,
                enabled=wish.enabled,
            ),
        )
        secret = shown.secrets.secrets[0].value
        return {**_view(shown, is_admin=True), "secret": secret}

    return await answer_once(request, principal.workspace, body, make, secrets=("secret",))


@router.get(
    "/webhooks", response_model=WebhookList, responses=ERRORS, summary="The workspace's webhooks"
)
async def list_webhooks(request: Request) -> Response:
    """Oldest first, without their secrets."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    is_admin = principal.can(Scope.ADMIN)
    found = await services.webhooks.all(principal.workspace)
    items = [_view(shown, is_admin=is_admin) for shown in found]
    return json_response({"items": items, "nextCursor": None})


@router.get(
    "/webhooks/{webhook_id}", response_model=WebhookView, responses=ERRORS, summary="One webhook"
)
async def get_webhook(request: Request, webhook_id: str) -> Response:
    """Without its secret."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    shown = await services.webhooks.load(principal.workspace, webhook_id)
    return json_response(_view(shown, is_admin=principal.can(Scope.ADMIN)))


@router.patch(
    "/webhooks/{webhook_id}",
    response_model=WebhookView,
    responses=ERRORS,
    openapi_extra=described(WebhookPatch, example={"enabled": False}),
    summary="Change a webhook",
)
async def update_webhook(request: Request, webhook_id: str) -> Response:
    """What is left out stays; null takes `workflowId` or `description` away."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    wish = validate(WebhookPatch, await _body(request, services))
    given = wish.model_fields_set
    changed = await services.webhooks.change(
        principal.workspace,
        webhook_id,
        WebhookWish(
            url=wish.url,
            events=wish.events,
            modes=wish.modes,
            workflow_id=wish.workflow_id,
            description=wish.description,
            headers={} if "headers" in given and wish.headers is None else wish.headers,
            enabled=wish.enabled,
            is_for_all_workflows="workflow_id" in given and wish.workflow_id is None,
            is_undescribed="description" in given and wish.description is None,
        ),
    )
    return json_response(_view(changed, is_admin=True))


@router.delete(
    "/webhooks/{webhook_id}", status_code=204, responses=ERRORS, summary="Delete a webhook"
)
async def delete_webhook(request: Request, webhook_id: str) -> Response:
    """With its deliveries; nothing more is sent."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    await services.webhooks.delete(principal.workspace, webhook_id)
    return Response(status_code=204)


@router.post(
    "/webhooks/{webhook_id}/test",
    status_code=202,
    response_model=DeliveryView,
    responses=ERRORS,
    openapi_extra=described(headers=(IDEMPOTENCY_KEY,)),
    summary="Send a test event",
)
async def test_webhook(request: Request, webhook_id: str) -> Response:
    """`webhook.test`, whatever the filter; the answer is its delivery."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)

    async def make() -> dict[str, object]:
        return _delivery_view(await services.webhooks.test(principal.workspace, webhook_id))

    return await answer_once(request, principal.workspace, None, make, status=202)


@router.post(
    "/webhooks/{webhook_id}/rotate-secret",
    response_model=WebhookSecret,
    responses=ERRORS,
    openapi_extra=described(
        RotateSecretRequest,
        example={"overlap": 3_600_000},
        is_required=False,
        headers=(IDEMPOTENCY_KEY,),
    ),
    summary="Make a new secret",
)
async def rotate_secret(request: Request, webhook_id: str) -> Response:
    """The present one signs beside it for `overlap` ms (default 24 h); 0 ends it at once."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    body, wish = await _wish(request, services, RotateSecretRequest)
    overlap_ms = OVERLAP_DEFAULT_MS if wish.overlap is None else wish.overlap

    async def make() -> dict[str, object]:
        workspace = principal.workspace
        return {"secret": await services.webhooks.rotate(workspace, webhook_id, overlap_ms)}

    secrets = ("secret",)
    return await answer_once(request, principal.workspace, body, make, secrets=secrets, status=200)


@router.get(
    "/webhooks/{webhook_id}/deliveries",
    response_model=DeliveryList,
    responses=ERRORS,
    openapi_extra=described(
        query={
            "status": ({"type": "string", "enum": list(DeliveryStatus)}, "In this status alone."),
            "cursor": ({"type": "string"}, "`nextCursor` of the page before."),
            "limit": ({"type": "integer", "minimum": 1, "maximum": LIST_MAX}, "Items on a page."),
        }
    ),
    summary="What was sent to a webhook",
)
async def list_deliveries(request: Request, webhook_id: str) -> Response:
    """`?status=&cursor=&limit=`, newest first, with every try."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    query = _query(request, webhook_id)
    found, cursor = await services.webhooks.deliveries(principal.workspace, query)
    return json_response(
        {
            "items": [_delivery_view(one) for one in found],
            "nextCursor": None if cursor is None else f"{cursor[0]}.{cursor[1]}",
        }
    )


@router.get(
    "/deliveries/{delivery_id}",
    response_model=DeliveryView,
    responses=ERRORS,
    summary="One delivery",
)
async def get_delivery(request: Request, delivery_id: str) -> Response:
    """With every try."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    found = await services.webhooks.delivery(principal.workspace, delivery_id)
    return json_response(_delivery_view(found))


@router.post(
    "/deliveries/{delivery_id}/replay",
    status_code=202,
    response_model=DeliveryView,
    responses=ERRORS,
    openapi_extra=described(headers=(IDEMPOTENCY_KEY,)),
    summary="Send a delivery again",
)
async def replay_delivery(request: Request, delivery_id: str) -> Response:
    """With the same `webhook-id`, a new time and a new signature."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)

    async def make() -> dict[str, object]:
        return _delivery_view(await services.webhooks.replay(principal.workspace, delivery_id))

    return await answer_once(request, principal.workspace, None, make, status=202)


@router.post(
    "/webhooks/{webhook_id}/replay",
    status_code=202,
    response_model=Replayed,
    responses=ERRORS,
    openapi_extra=described(
        ReplayRequest, example={"status": "dead"}, is_required=False, headers=(IDEMPOTENCY_KEY,)
    ),
    summary="Send many deliveries again",
)
async def replay_webhook(request: Request, webhook_id: str) -> Response:
    """`{status?, from?, to?}`; without a status all that has ended. Bounded: see `isComplete`."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    body, wish = await _wish(request, services, ReplayRequest)
    query = DeliveryQuery(
        webhook_id,
        None if wish.status is None else DeliveryStatus(wish.status),
        from_ms=None if wish.from_ is None else int(wish.from_.timestamp() * 1000),
        to_ms=None if wish.to is None else int(wish.to.timestamp() * 1000),
    )

    async def make() -> dict[str, object]:
        replayed = await services.webhooks.replay_all(principal.workspace, query)
        return {"replayed": replayed.count, "isComplete": replayed.is_complete}

    return await answer_once(request, principal.workspace, body, make, status=202)


async def _body(request: Request, services: Services) -> object:
    return parse_json(await read_body(request, BODY_BYTES_MAX), services.settings.json_depth_max)


async def _wish(request: Request, services: Services, model: type[Model]) -> tuple[object, Model]:
    """A body all of whose members are optional may be left out itself."""
    raw = await read_body(request, BODY_BYTES_MAX)
    body = parse_json(raw, services.settings.json_depth_max) if raw else {}
    return body, validate(model, body)


def _query(request: Request, webhook_id: str) -> DeliveryQuery:
    params = request.query_params
    status = params.get("status")
    if status is not None and status not in set(DeliveryStatus):
        problem = Problem(("query", "status"), f"one of {', '.join(DeliveryStatus)}")
        raise InvalidRequestError("status is not known", [problem])
    before = None
    if cursor := params.get("cursor"):
        created_ms, _, last_id = cursor.partition(".")
        if not (created_ms.isascii() and created_ms.isdigit() and last_id):
            raise InvalidCursorError("send the nextCursor of the last page as cursor")
        before = (int(created_ms[:15]), last_id)
    return DeliveryQuery(
        webhook_id,
        None if status is None else DeliveryStatus(status),
        before=before,
        limit=whole_number(request, "limit", LIST_DEFAULT, 1, LIST_MAX),
    )


def _view(shown: Shown, *, is_admin: bool) -> dict[str, object]:
    webhook, headers = shown.webhook, shown.secrets.headers
    return {
        "id": webhook.id,
        "url": webhook.url,
        "events": list(webhook.events),
        "modes": list(webhook.modes),
        "workflowId": webhook.workflow_id,
        "description": webhook.description,
        "headers": {name: value if is_admin else HIDDEN for name, value in headers.items()},
        "enabled": webhook.enabled,
        "disabledReason": webhook.disabled_reason,
        "isReadable": shown.is_readable,
        "createdAt": timestamp(webhook.created_at_ms),
    }


def _delivery_view(delivery: Delivery) -> dict[str, object]:
    next_ms = delivery.next_attempt_at_ms
    return {
        "id": delivery.id,
        "webhookId": delivery.webhook_id,
        "eventId": delivery.event_id,
        "eventType": delivery.event_type,
        "status": delivery.status,
        "attempts": [
            {
                "at": timestamp(attempt.at_ms),
                "status": attempt.status,
                "latencyMs": attempt.latency_ms,
                "error": attempt.error,
                "answer": attempt.answer,
            }
            for attempt in delivery.attempts
        ],
        "nextAttemptAt": None if next_ms is None else timestamp(next_ms),
        "createdAt": timestamp(delivery.created_at_ms),
    }

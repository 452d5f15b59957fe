"""`/v1/hosts/decisions`: why the router chose as it did.

It names requests of every workspace, so it is for the operator alone.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import DecisionList
from serve_app.core.auth import Scope
from serve_app.core.errors import ForbiddenError
from serve_app.core.routing import Candidate, Decision
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import services_of
from serve_app.ingress.openapi import described
from serve_app.ingress.queries import whole_number
from serve_app.ingress.views import timestamp

router = APIRouter(prefix="/v1", tags=["hosts"])

LIST_DEFAULT = 50
LIST_MAX = 500


@router.get(
    "/hosts/decisions",
    response_model=DecisionList,
    responses=ERRORS,
    openapi_extra=described(
        query={"limit": ({"type": "integer", "minimum": 1, "maximum": LIST_MAX}, "How many.")}
    ),
    summary="Why requests went where they went",
)
async def list_decisions(request: Request) -> Response:
    """`?limit=`; newest first, with what was expected and what came of it."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.ADMIN)
    if principal.workspace != services.settings.workspace_id:
        raise ForbiddenError("decisions are shown to an admin key of the first workspace")
    limit = whole_number(request, "limit", LIST_DEFAULT, 1, LIST_MAX)
    found = await services.inference.decisions(limit)
    return json_response({"items": [_decision_view(decision) for decision in found]})


def _decision_view(decision: Decision) -> dict[str, object]:
    return {
        "requestId": decision.request_id,
        "at": timestamp(decision.at_ms),
        "model": decision.model,
        "promptTokens": decision.prompt_tokens,
        "hostId": decision.chosen.replica_id,
        "reason": decision.reason,
        "expectedTtftMs": round(decision.chosen.ttft_ms, 2),
        "ttftMs": decision.ttft_ms,
        "expectedCachedTokens": decision.chosen.overlap_tokens,
        "cachedTokens": decision.cached_tokens,
        "candidates": [_candidate_view(candidate) for candidate in decision.candidates],
    }


def _candidate_view(candidate: Candidate) -> dict[str, object]:
    if candidate.refusal:
        return {"hostId": candidate.replica_id, "refusal": candidate.refusal}
    return {
        "hostId": candidate.replica_id,
        "scoreMs": round(candidate.score_ms, 2),
        "expectedTtftMs": round(candidate.ttft_ms, 2),
        "expectedCachedTokens": candidate.overlap_tokens,
        "running": candidate.running_count,
    }

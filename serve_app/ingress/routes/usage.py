"""`GET /v1/usage`: what the workspace has used, by workflow, key or day.

Owns the reading of days and the public shape of the counts. Days are UTC, both ends included.
"""

from datetime import UTC, date, datetime, timedelta

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import UsageReport
from serve_app.core.auth import Scope
from serve_app.core.errors import InvalidRequestError, Problem
from serve_app.core.usage import GroupBy, UsageRow, day_of, grouped, total
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import services_of
from serve_app.ingress.openapi import described
from serve_app.ingress.views import usage_view

router = APIRouter(prefix="/v1", tags=["usage"])

DAYS_DEFAULT = 30
DAYS_MAX = 366
FIRST_DAY, LAST_DAY = date(2000, 1, 1), date(2999, 12, 31)  # what one can count back and on from


_DAY = {"type": "string", "format": "date"}


@router.get(
    "/usage",
    response_model=UsageReport,
    responses=ERRORS,
    openapi_extra=described(
        query={
            "from": (_DAY, "First day, UTC; a time counts as its day."),
            "to": (_DAY, "Last day, included; today, if left out."),
            "groupBy": ({"type": "string", "enum": list(GroupBy)}, "What an item is for."),
        }
    ),
    summary="Tokens used",
)
async def get_usage(request: Request) -> Response:
    """`?from=&to=&groupBy=`; without them the last 30 days by workflow."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    last = _day(request, "to") or day_of(services.clock.now_ms())
    first = _day(request, "from") or last - timedelta(days=DAYS_DEFAULT - 1)
    if not 0 <= (last - first).days < DAYS_MAX:
        problem = Problem(("query", "from"), f"from 1 to {DAYS_MAX} days, in order")
        raise InvalidRequestError("from and to do not fit together", [problem])
    group_by = _group_by(request)
    rows = await services.usage.rows(principal.workspace, first, last)
    items = [
        {group_by.value: name, **_item_view(row)} for name, row in grouped(rows, group_by).items()
    ]
    body = {
        "items": items,
        "totals": _item_view(total(rows)),
        "from": first.isoformat(),
        "to": last.isoformat(),
    }
    return json_response(body)


def _day(request: Request, name: str) -> date | None:
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
        day = (moment if moment.tzinfo is None else moment.astimezone(UTC)).date()
    except (ValueError, OverflowError) as error:
        raise _no_day(name) from error
    if not FIRST_DAY <= day <= LAST_DAY:
        raise _no_day(name)
    return day


def _no_day(name: str) -> InvalidRequestError:
    problem = Problem(("query", name), "a day as YYYY-MM-DD, or an RFC 3339 time")
    return InvalidRequestError(f"{name} is no day", [problem])


def _group_by(request: Request) -> GroupBy:
    wanted = request.query_params.get("groupBy", GroupBy.WORKFLOW)
    if wanted not in set(GroupBy):
        problem = Problem(("query", "groupBy"), f"one of {', '.join(GroupBy)}")
        raise InvalidRequestError("usage cannot be grouped so", [problem])
    return GroupBy(wanted)


def _item_view(row: UsageRow) -> dict[str, object]:
    return {
        "requests": row.requests,
        **usage_view(row.usage),
        "cachedTokens": row.usage.cached_tokens,
        "wastedTokens": sum(row.wasted.values()),
        "wasted": dict(row.wasted),
    }

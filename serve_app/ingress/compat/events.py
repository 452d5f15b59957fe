"""`POST /e/{event_key}`: events in, in the form that Inngest's SDKs send.

Owns the path, the key that stands in it, the form of an event and of a refusal, which has the text
as `error` beside our own members: the SDKs take an answer without it for success. Invariant: no
event of a request is accepted before all of them are found right.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any

import orjson
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.requests import Request
from starlette.responses import Response

from inferpipe.wire import Problem as ProblemModel
from serve_app.core.app_events import (
    EVENT_ID_MAX,
    EVENT_NAME_MAX,
    AppEvent,
    event_name_problem,
)
from serve_app.core.auth import Scope
from serve_app.core.errors import InvalidRequestError, Problem, ServeAppError
from serve_app.ingress.answers import ERRORS
from serve_app.ingress.app import services_of
from serve_app.ingress.bodies import read_json, validate
from serve_app.ingress.direct_route import DirectRoute
from serve_app.ingress.errors import STATUS, error_headers, problem_body
from serve_app.ingress.idempotency import answer_once
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, described

DEFAULT_KEY = "NO_EVENT_KEY_SET"  # what the SDK sends in its development mode
SEED_HEADER = "x-inngest-event-id-seed"  # the same on every try of one send
SEED_MAX = 255
TS_MAX = 253_402_300_800_000  # ms, the year 10000: RFC 3339 has no later one


class _EventRoute(DirectRoute):
    """A route whose refusals say `error` too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_in_words(request: Request) -> Response:
            try:
                return await handle(request)
            except ServeAppError as error:
                body = {**problem_body(error, request.state.request_id), "error": str(error)}
                headers = error_headers(error)
                kind = "application/problem+json"
                return Response(orjson.dumps(body), STATUS[error.code], headers, kind)

        return handle_in_words


router = APIRouter(tags=["events"], route_class=_EventRoute)


class EventBody(BaseModel):
    """One event; what else an SDK sends with it is not looked at."""

    model_config = ConfigDict(extra="ignore", title="Event")

    name: Annotated[str, Field(min_length=1, max_length=EVENT_NAME_MAX)]
    data: Any = None
    id: Annotated[str, Field(max_length=EVENT_ID_MAX)] | None = None
    ts: Annotated[StrictInt, Field(ge=0, lt=TS_MAX)] | None = None
    user: dict[str, Any] | None = None


class EventsAnswer(BaseModel):
    """What was accepted: an id for each event, in order."""

    ids: list[str]
    status: int


class EventProblem(ProblemModel):
    """A refusal; `error` is the same text as `detail`."""

    error: str


_EXAMPLE = {"name": "app/ticket.created", "data": {"text": "It crashes"}, "id": "ticket-7"}


@router.post(
    "/e/{event_key}",
    response_model=EventsAnswer,
    responses={status: {**error, "model": EventProblem} for status, error in ERRORS.items()},
    openapi_extra=described(
        {"anyOf": [EventBody.model_json_schema(), {"type": "array"}]},
        example=_EXAMPLE,
        headers=(IDEMPOTENCY_KEY,),
    ),
    summary="Send an event, or a list of them",
)
async def send_events(request: Request, event_key: str) -> Response:
    """Each starts the workflows whose triggers take it, and answers steps that wait for it.

    `event_key` is an API key with `execute`. Answered once the events are durable.
    """
    services = services_of(request)
    sent_key = "" if event_key == DEFAULT_KEY else event_key
    principal = await services.authenticator.principal(request, Scope.EXECUTE, sent_key)
    value = await read_json(request, services.settings)
    events = _events(value, services.clock.now_ms(), principal.workspace, principal.key_id)
    seed = request.headers.get(SEED_HEADER, "")[:SEED_MAX] or None

    async def make() -> Mapping[str, object]:
        return {"ids": await services.events.publish(events, seed), "status": 200}

    return await answer_once(request, principal.workspace, value, make, status=200)


def _events(value: object, now_ms: int, workspace: str, key_id: str) -> list[AppEvent]:
    problems: list[Problem] = []
    events: list[AppEvent] = []
    many = isinstance(value, list)
    for index, one in enumerate(value if isinstance(value, list) else [value]):
        place = (index,) if many else ()
        try:
            body = validate(EventBody, one)
        except InvalidRequestError as error:
            problems += [Problem(("body", *place, *p.loc[1:]), p.msg) for p in error.problems]
            continue
        if (problem := event_name_problem(body.name)) is not None:
            problems.append(Problem(("body", *place, "name"), problem))
        ts = now_ms if body.ts is None else body.ts
        data, name, event_id = _data(body.data), body.name, body.id or ""
        events.append(AppEvent(workspace, name, event_id, data, ts, body.user, None, key_id))
    if problems:
        first = problems[0]
        place_text = ".".join(str(part) for part in first.loc)
        raise InvalidRequestError(f"no event was taken: {place_text} {first.msg}", problems)
    return events


def _data(found: Any) -> Any:
    """The input of what it starts; `_inngest` is the server's own member, not a sender's."""
    if isinstance(found, dict):
        return {name: value for name, value in found.items() if name != "_inngest"}
    return {} if found is None else found

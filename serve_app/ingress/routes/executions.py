"""`/v1/execute*` and `/v1/executions/*`: start, look, follow, cancel.

Owns the translation between the wire and `services.executions`, and what a caller's going away
means. Invariant: a stream holds a cursor and no queue; a caller that leaves `POST /v1/execute`
without an Idempotency-Key cancels the work down to the engine.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from inferpipe.wire import (
    ExecuteRequest,
    ExecutionInfo,
    ExecutionList,
    ExecutionRecord,
    ExecutionResult,
    RetryConfig,
)
from serve_app.core.auth import Scope
from serve_app.core.errors import (
    AlreadyTerminalError,
    InvalidCursorError,
    InvalidRequestError,
    Problem,
    UnknownExecutionError,
    UnknownWorkflowError,
)
from serve_app.core.execution import Execution, Status
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.ingress.answers import ERRORS, json_response
from serve_app.ingress.app import Services, services_of
from serve_app.ingress.bodies import read_json, validate
from serve_app.ingress.direct_route import DirectRoute
from serve_app.ingress.idempotency import body_hash, idempotency_key
from serve_app.ingress.openapi import IDEMPOTENCY_KEY, LAST_EVENT_ID, SSE, described
from serve_app.ingress.queries import whole_number
from serve_app.ingress.views import (
    KEEP_ALIVE,
    item_view,
    record_view,
    render_gap,
    result_view,
)
from serve_app.ports import ListQuery
from serve_app.services.executions import RetryWish, Started, Submission
from serve_app.services.feeds import Feed

router = APIRouter(prefix="/v1", tags=["executions"], route_class=DirectRoute)

LIST_DEFAULT = 50
LIST_MAX = 200
SIGN_OF_LIFE_S = 0.5  # a caller that went away is noticed so soon; the end must come within 2 s
_SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_EXECUTE = described(
    ExecuteRequest,
    example={"workflowId": "test-echo", "input": {"message": "hello world"}},
    headers=(IDEMPOTENCY_KEY,),
)
_STARTED = {"X-Execution-Id": {"$ref": "#/components/headers/X-Execution-Id"}}


@router.post(
    "/execute",
    response_model=ExecutionResult,
    responses={**ERRORS, 200: {"headers": _STARTED}},
    openapi_extra=_EXECUTE,
    summary="Run a workflow and wait for its result",
)
async def execute(request: Request) -> Response:
    """Answer with the result, in whatever terminal state."""
    services = services_of(request)
    submission = await _submission(request, services, "sync")
    async with AsyncExitStack() as stack:
        try:
            started, feed = await stack.enter_async_context(
                services.executions.start_and_follow(submission)
            )
            ended = await _ended_soon(feed)
        except asyncio.CancelledError:
            # Serve cancels the handler of a caller that went away, while it is being accepted too.
            await _abandon(services, submission)
            raise
        headers = _started_headers(started)
        if ended is not None:
            return json_response(result_view(ended), headers=headers)
        waiting = _wait(services, submission, feed, stack.pop_all())
    return StreamingResponse(waiting, 200, headers, "application/json")


@router.post(
    "/execute/async",
    status_code=202,
    response_model=ExecutionInfo,
    responses={**ERRORS, 202: {"headers": _STARTED}},
    openapi_extra=_EXECUTE,
    summary="Start a workflow and return its id",
)
async def execute_async(request: Request) -> Response:
    """Answer as soon as the execution is durable."""
    services = services_of(request)
    started = await services.executions.start(await _submission(request, services, "async"))
    info = {"id": started.execution.id, "status": started.execution.status}
    return json_response(info, 202, _started_headers(started))


@router.post(
    "/execute/stream",
    response_class=StreamingResponse,
    responses={**ERRORS, 200: {**SSE, "headers": _STARTED}},
    openapi_extra=_EXECUTE,
    summary="Run a workflow and stream its events",
)
async def execute_stream(request: Request) -> Response:
    """Stream from the first event; leaving does not cancel."""
    services = services_of(request)
    submission = await _submission(request, services, "stream")
    stack = AsyncExitStack()
    started, feed = await stack.enter_async_context(
        services.executions.start_and_follow(submission)
    )
    return _stream(services, stack, feed, 0, _started_headers(started))


@router.get(
    "/executions/{execution_id}",
    response_model=ExecutionRecord,
    responses=ERRORS,
    summary="The full record of an execution",
)
async def get_execution(request: Request, execution_id: str) -> Response:
    """Status, steps and result."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    execution = await services.executions.load(principal.workspace, execution_id)
    created = execution.created
    try:
        workflow = await services.catalog.version(
            created.workspace, created.workflow_id, created.workflow_version
        )
    except UnknownWorkflowError:
        workflow = None  # its definition was deleted; the record stays readable
    return json_response(record_view(execution, workflow))


@router.get(
    "/executions/{execution_id}/stream",
    response_class=StreamingResponse,
    responses={
        **ERRORS,
        200: {**SSE, "headers": _STARTED},
        204: {"description": "Ended before this cursor: do not reconnect"},
    },
    openapi_extra=described(
        headers=(LAST_EVENT_ID,),
        query={"after": ({"type": "string", "pattern": "^[0-9]{1,15}$"}, "As `Last-Event-ID`.")},
    ),
    summary="Follow an execution from the start or from a cursor",
)
async def stream_execution(request: Request, execution_id: str) -> Response:
    """Resume with `Last-Event-ID` or `?after=`; the header wins."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    cursor = _cursor(request)
    async with AsyncExitStack() as stack:
        feed = await stack.enter_async_context(
            services.executions.follow(principal.workspace, execution_id)
        )
        if feed.execution.is_terminal and cursor == feed.execution.seq:
            return Response(status_code=204)
        return _stream(services, stack.pop_all(), feed, cursor, {"X-Execution-Id": execution_id})


@router.post(
    "/executions/{execution_id}/cancel",
    status_code=202,
    response_model=ExecutionInfo,
    responses=ERRORS,
    summary="Stop an execution, down to the engine",
)
async def cancel_execution(request: Request, execution_id: str) -> Response:
    """Ask for the end; it is there within 2 s."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.EXECUTE)
    reason = "cancelled by the caller"
    execution = await services.executions.cancel(principal.workspace, execution_id, reason)
    return json_response({"id": execution.id, "status": execution.status}, 202)


@router.get(
    "/executions",
    response_model=ExecutionList,
    responses=ERRORS,
    openapi_extra=described(
        query={
            "workflowId": ({"type": "string"}, "Of this workflow alone."),
            "status": ({"type": "string", "enum": list(Status)}, "In this status alone."),
            "cursor": ({"type": "string"}, "`nextCursor` of the page before."),
            "limit": ({"type": "integer", "minimum": 1, "maximum": LIST_MAX}, "Items on a page."),
        }
    ),
    summary="Executions of the workspace, newest first",
)
async def list_executions(request: Request) -> Response:
    """`?workflowId=&status=&cursor=&limit=`; items have neither `data` nor `steps`."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.READ)
    query = _list_query(request, principal.workspace)
    found = await services.executions.recent(query)
    last = found[-1] if len(found) == query.limit else None
    cursor = None if last is None else f"{last.created.at_ms}.{last.id}"
    return json_response({"items": [item_view(one) for one in found], "nextCursor": cursor})


@router.post(
    "/executions/{execution_id}/retry",
    status_code=202,
    response_model=ExecutionInfo,
    responses=ERRORS,
    openapi_extra=described(
        headers=(IDEMPOTENCY_KEY,),
        query={"fromStep": ({"type": "string"}, "Keep the results of the steps before it.")},
    ),
    summary="Run an ended execution again as a new one",
)
async def retry_execution(request: Request, execution_id: str) -> Response:
    """`?fromStep=` keeps the results of the steps before it."""
    services = services_of(request)
    principal = await services.authenticator.principal(request, Scope.EXECUTE)
    wish = RetryWish(
        request.query_params.get("fromStep"), idempotency_key(request), principal.key_id
    )
    started = await services.executions.retry(principal.workspace, execution_id, wish)
    info = {
        "id": started.execution.id,
        "status": started.execution.status,
        "retryOf": execution_id,
    }
    return json_response(info, 202, _started_headers(started))


async def _submission(request: Request, services: Services, mode: str) -> Submission:
    principal = await services.authenticator.principal(request, Scope.EXECUTE)
    value = await read_json(request, services.settings)
    wish = validate(ExecuteRequest, value)
    key = idempotency_key(request)
    retry = wish.retry_config
    scope: str = request.scope["path"]
    return Submission(
        workspace=principal.workspace,
        execution_id=services.executions.new_id(principal.workspace, scope, key),
        workflow_id=wish.workflow_id,
        input=wish.input,
        timeout_ms=wish.timeout,
        retry=None if retry is None else _retry_policy(retry),
        metadata=wish.metadata or {},
        user_id=wish.user_id,
        priority=wish.priority or 0,
        key_id=principal.key_id,
        mode=mode,
        idempotency_key=key,
        request_hash=None if key is None else body_hash(value),
        cache_ttl_ms=None if wish.cache is None else wish.cache.ttl * 1000,
    )


def _retry_policy(wish: RetryConfig) -> RetryPolicy:
    policy = RetryPolicy(attempts=wish.attempts)
    if wish.backoff is not None:
        policy = replace(policy, backoff=Backoff(wish.backoff))
    if wish.max_delay is not None:
        policy = replace(policy, max_delay_ms=wish.max_delay)
    return policy


def _list_query(request: Request, workspace: str) -> ListQuery:
    params = request.query_params
    status = params.get("status")
    if status is not None and status not in set(Status):
        problem = Problem(("query", "status"), f"one of {', '.join(Status)}")
        raise InvalidRequestError("there is no such status", [problem])
    limit = whole_number(request, "limit", LIST_DEFAULT, 1, LIST_MAX)
    before = None
    if cursor := params.get("cursor"):
        created_ms, _, last_id = cursor.partition(".")
        if not (created_ms.isascii() and created_ms.isdigit() and last_id):
            raise InvalidCursorError("send the nextCursor of the last page as cursor")
        before = (int(created_ms[:15]), last_id)
    return ListQuery(workspace, params.get("workflowId"), status, before, limit)


def _cursor(request: Request) -> int:
    text = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 16):  # noqa: PLR2004 - exact in JSON
        raise InvalidCursorError(f"{text[:40]!r} is no cursor: send the id of the last event seen")
    return int(text)


def _stream(
    services: Services, stack: AsyncExitStack, feed: Feed, cursor: int, headers: dict[str, str]
) -> Response:
    async def frames() -> AsyncIterator[bytes]:
        async with stack:
            position = cursor
            if cursor > feed.execution.seq:
                # Nothing was ever there: say so, and go on where the journal ends.
                last = feed.execution.seq
                position = last - feed.execution.is_terminal
                yield render_gap(cursor, last, feed.execution, services.clock.now_ms())
            while True:
                try:
                    async with asyncio.timeout(services.settings.keep_alive_s):
                        batch = await services.feeds.next_frames(feed, position)
                except TimeoutError:
                    yield KEEP_ALIVE
                    continue
                if not batch:
                    return
                position = batch[-1][0]
                shown = b"".join(frame for _, frame in batch if frame is not None)
                if shown:
                    yield shown

    return StreamingResponse(frames(), 200, {**_SSE_HEADERS, **headers}, "text/event-stream")


async def _wait(
    services: Services, submission: Submission, feed: Feed, stack: AsyncExitStack
) -> AsyncIterator[bytes]:
    """The body of a long wait: white space, which JSON allows before a value, then the result.

    Only by writing can one be sure that the caller is still there: a proxy that has nothing to
    pass on may keep its side open (HAProxy 2.8 did so for one caller in twenty). It also keeps
    proxies with an idle time-out from giving up.
    """
    ended = None
    async with stack:
        try:
            while ended is None:
                yield b" "
                ended = await _ended_soon(feed)
        finally:
            if ended is None:
                # In a task of its own: the cancellation that got us here may come again.
                await asyncio.shield(services.detached(_abandon(services, submission)))
        yield orjson.dumps(result_view(ended))


async def _ended_soon(feed: Feed) -> Execution | None:
    try:
        async with asyncio.timeout(SIGN_OF_LIFE_S):
            return await feed.ended()
    except TimeoutError:
        return None


async def _abandon(services: Services, submission: Submission) -> None:
    """Cancel what nobody waits for; with an Idempotency-Key the caller may come back for it."""
    if submission.idempotency_key is not None:
        return
    workspace, execution_id = submission.workspace, submission.execution_id
    try:
        await services.executions.cancel(workspace, execution_id, "the caller went away")
    except (AlreadyTerminalError, UnknownExecutionError):
        return  # it ended in the same moment, or was never accepted: there is nothing to stop


def _started_headers(started: Started) -> dict[str, str]:
    headers = {"X-Execution-Id": started.execution.id}
    if not started.is_new:
        headers["Idempotency-Replayed"] = "true"
    return headers

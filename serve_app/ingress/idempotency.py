"""Idempotency-Key on every POST that creates something: the same key gives the first answer again.

Owns the header, the comparison of bodies and what of an answer is kept. The routes that start an
execution need none of it: their key gives the execution's id. Invariants: a refusal is not kept, a
secret is never kept, and what was begun is finished although its caller has gone.

A route's whole use of it::

    return await answer_once(request, principal.workspace, body, make, secrets=("key",))

where `body` is the parsed JSON and `make` does the work and returns the members of the answer.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve_app.core.errors import (
    IdempotencyConflictError,
    IdempotencyInProgressError,
    InvalidRequestError,
    StoreUnavailableError,
)
from serve_app.ingress.answers import json_response
from serve_app.ingress.app import Services, services_of
from serve_app.ports import Claim, ClaimState

logger = logging.getLogger(__name__)

KEY_LENGTH_MAX = 255
WAIT_S = 5.0  # of a repeat for the first one to finish; then 409 with Retry-After
_ASK_AGAIN_S = 0.05

Make = Callable[[], Awaitable[Mapping[str, object]]]


def idempotency_key(request: Request) -> str | None:
    """The key, where one was sent.

    Raises:
        InvalidRequestError: it is empty or too long.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= KEY_LENGTH_MAX:
        raise InvalidRequestError(f"Idempotency-Key takes 1 to {KEY_LENGTH_MAX} characters")
    return key


def body_hash(value: object) -> str:
    """The same for bodies that are the same JSON, whatever their white space and order."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def answer_once(
    request: Request,
    workspace: str,
    body: object,
    make: Make,
    *,
    secrets: tuple[str, ...] = (),
    status: int = 201,
) -> Response:
    """Do the work of a creating POST once per Idempotency-Key, workspace and path.

    Args:
        request: the key and the path are taken from it.
        workspace: the caller's.
        body: the parsed JSON body; None where there is none.
        make: does the work; what it raises is the answer, and is not kept.
        secrets: members of the answer that a repeat does not get again.
        status: of the answer.

    Raises:
        IdempotencyConflictError: the key came before with another body.
        IdempotencyInProgressError: its first request is still under way.
    """
    key = idempotency_key(request)
    if key is None:
        return json_response(await make(), status)
    services = services_of(request)
    scope = (workspace, request.scope["path"], key)
    claim_id = services.entropy.token()
    claim = await _claim(services, scope, body_hash(body), claim_id)
    if claim.answer is not None:
        kept = orjson.loads(claim.answer)
        headers = {"Idempotency-Replayed": "true"}
        return json_response(kept["body"], kept["status"], headers)

    async def work() -> Mapping[str, object]:
        try:
            made = await make()
        except BaseException:
            await services.idempotency.drop(scope, claim_id)
            raise
        await _keep(services, scope, claim_id, _answer(made, secrets, status))
        return made

    # In a task of its own: a caller that leaves now must find its answer when it comes back.
    return json_response(await asyncio.shield(services.detached(work())), status)


async def _claim(
    services: Services, scope: tuple[str, ...], wanted_hash: str, claim_id: str
) -> Claim:
    give_up_s = services.clock.monotonic_s() + WAIT_S
    while True:
        claim = await services.idempotency.begin(scope, wanted_hash, claim_id)
        if claim.state is ClaimState.CONFLICT:
            raise IdempotencyConflictError(
                "this Idempotency-Key was used with another body; use a new key"
            )
        if claim.state is not ClaimState.BUSY:
            return claim
        if services.clock.monotonic_s() > give_up_s:
            raise IdempotencyInProgressError(
                "the first request with this Idempotency-Key is still under way; repeat it later"
            )
        await services.clock.sleep(_ASK_AGAIN_S)


async def _keep(services: Services, scope: tuple[str, ...], claim_id: str, answer: bytes) -> None:
    try:
        await services.idempotency.finish(scope, claim_id, answer)
    except StoreUnavailableError:
        # What was made is made, and its secret is in this answer alone: the caller must have it.
        logger.exception("an answer was not kept for repeats of its Idempotency-Key")


def _answer(made: Mapping[str, object], secrets: tuple[str, ...], status: int) -> bytes:
    body = {name: value for name, value in made.items() if name not in secrets}
    if len(body) < len(made):
        body["secretShown"] = True
    return orjson.dumps({"status": status, "body": body})

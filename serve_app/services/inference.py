"""One model call: ask the router, talk to the replica, keep the bill.

Owns the way from a request to chunks for every surface. Carries no prompt to the router and no
token through it. Invariant: leaving the iterator early, for whatever reason, aborts the generation
down to the engine.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from serve_app.core.errors import ConnectionFailedError, NoHostsAvailableError
from serve_app.core.inference import (
    ANYWHERE,
    AdmitRequest,
    Chunk,
    GenerationRequest,
    Grant,
    Placement,
    Usage,
)
from serve_app.core.prefix import prefix_of, prompt_tokens_guess
from serve_app.core.routing import Decision
from serve_app.ports import Admission, TokenLink

REPLICAS_TRIED_MAX = 3  # before the first token; afterwards the caller decides
COMPLETION_TOKENS_GUESS = 256  # of a request that names no max_tokens


class Inference:
    """Generation, wherever the router finds room."""

    def __init__(self, admission: Admission, link: TokenLink) -> None:
        self._admission = admission
        self._link = link

    async def generate(
        self, request: GenerationRequest, placement: Placement = ANYWHERE
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer; every chunk carries the usage so far.

        Raises:
            ModelNotAvailableError: no such model.
            NoHostsAvailableError: no replica has room.
            ConnectionFailedError: the replica was lost after its first chunk, or several were
                before it.
            ServeAppError: what the engine answered.
        """
        lost: list[str] = []
        while True:
            grant = await self._admit(request, placement, tuple(lost))
            has_begun = False
            try:
                async with aclosing(self._metered(grant, request)) as chunks:
                    async for chunk in chunks:
                        has_begun = True
                        yield chunk
            except ConnectionFailedError:
                lost.append(grant.replica_id)
                if has_begun or len(lost) >= REPLICAS_TRIED_MAX:
                    raise
            else:
                return

    async def decisions(self, limit: int) -> Sequence[Decision]:
        """See `ports.Admission`."""
        return await self._admission.decisions(limit)

    async def _admit(
        self, request: GenerationRequest, placement: Placement, lost: tuple[str, ...]
    ) -> Grant:
        wanted = admit_request(request, placement, lost)
        try:
            return await self._admission.admit(wanted)
        except NoHostsAvailableError as error:
            if lost:
                raise ConnectionFailedError("the replica was lost and no other has room") from error
            raise

    async def _metered(
        self, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        reported = Usage()
        completion_tokens = 0
        async with aclosing(self._link.generate(grant, request)) as chunks:
            async for chunk in chunks:
                completion_tokens += len(chunk.token_ids)
                reported = chunk.usage or reported
                tokens = max(completion_tokens, reported.completion_tokens)
                yield replace(chunk, usage=replace(reported, completion_tokens=tokens))


def admit_request(
    request: GenerationRequest, placement: Placement = ANYWHERE, excluded: tuple[str, ...] = ()
) -> AdmitRequest:
    """What the router is told of a request."""
    prompt_tokens = prompt_tokens_guess(request)
    return AdmitRequest(
        request_id=request.request_id,
        model=request.model,
        token_count=prompt_tokens + (request.max_tokens or COMPLETION_TOKENS_GUESS),
        excluded=excluded,
        prompt_tokens=prompt_tokens,
        prefix=prefix_of(request),
        tenant=request.tenant,
        session=request.session,
        priority=request.priority,
        deadline_ms=request.deadline_ms,
        placement=placement,
    )

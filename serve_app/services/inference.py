"""One model call: ask the router, talk to the replica, keep the bill.

Owns the way from a request to chunks for every surface. Carries no prompt to the router and no
token through it. Invariant: leaving the iterator early, for whatever reason, aborts the generation
down to the engine; a lost replica is seen by nobody who does not look at `Chunk.resumed`.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from serve_app.core.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    NoHostsAvailableError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.inference import (
    ANYWHERE,
    AdmitRequest,
    Chunk,
    GenerationRequest,
    Grant,
    Placement,
)
from serve_app.core.prefix import prefix_of, prompt_tokens_guess
from serve_app.core.resume import Answer, DivergedError
from serve_app.core.routing import Decision
from serve_app.ports import Admission, Clock, TokenLink

COMPLETION_TOKENS_GUESS = 256  # of a request that names no max_tokens
FRUITLESS_MAX = 5  # attempts in a row that brought no token
RESUME_WAIT_S = 90.0  # for a replica: one that was killed is back in half of it, on a CPU too
RESUME_POLL_MIN_S = 0.05
RESUME_POLL_MAX_S = 0.5

logger = logging.getLogger(__name__)


class Inference:
    """Generation, wherever the router finds room, past the loss of replicas.

    Args:
        resume_wait_s: how long an answer that lost its replica waits for another.
    """

    def __init__(
        self,
        admission: Admission,
        link: TokenLink,
        clock: Clock,
        *,
        resume_wait_s: float = RESUME_WAIT_S,
    ) -> None:
        self._admission = admission
        self._link = link
        self._clock = clock
        self._resume_wait_s = resume_wait_s

    async def generate(
        self, request: GenerationRequest, placement: Placement = ANYWHERE
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer; every chunk carries the usage so far.

        A replica that is lost or drained on the way costs no token: see `core.resume`.

        Raises:
            ModelNotAvailableError: no such model.
            NoHostsAvailableError: no replica has room, and none was lost yet.
            ConnectionFailedError: the replica was lost, and no other took the rest in time.
            DeadlineExceededError: nor before the request's deadline.
            ServeAppError: what the engine answered.
        """
        answer = Answer(request)
        lost: list[str] = []
        fruitless = 0
        while fruitless < FRUITLESS_MAX:
            if answer.is_complete:
                yield answer.end()
                return
            asked = answer.next_request()
            grant = await self._admit(asked, placement, lost)
            known = len(answer.token_ids)
            try:
                async with aclosing(self._link.generate(grant, asked)) as chunks:
                    async for chunk in chunks:
                        fresh = answer.take(chunk)
                        if fresh is not None:
                            yield fresh
            except ConnectionFailedError as error:
                _note(request, grant, answer, str(error))
                lost.append(grant.replica_id)
            except DivergedError:
                _note(request, grant, answer, "the replay differed")
                answer.diverged()
            else:
                return
            fruitless = 0 if len(answer.token_ids) > known else fruitless + 1
        raise ConnectionFailedError(f"{fruitless} replicas were lost in a row")

    async def decisions(self, limit: int) -> Sequence[Decision]:
        """See `ports.Admission`."""
        return await self._admission.decisions(limit)

    async def _admit(
        self, request: GenerationRequest, placement: Placement, lost: list[str]
    ) -> Grant:
        """A grant at once, or, once a replica was lost, as soon as there is one."""
        if not lost:
            return await self._admission.admit(admit_request(request, placement))
        give_up_s = self._clock.monotonic_s() + self._resume_wait_s
        delay_s = RESUME_POLL_MIN_S
        while True:
            try:
                return await self._admission.admit(admit_request(request, placement, tuple(lost)))
            except (NoHostsAvailableError, OverloadedError) as error:
                self._check_patience(request, give_up_s, error)
            lost.clear()  # where only the link broke, the same replica may be the best there is
            await self._clock.sleep(delay_s)
            delay_s = min(2 * delay_s, RESUME_POLL_MAX_S)

    def _check_patience(
        self, request: GenerationRequest, give_up_s: float, error: ServeAppError
    ) -> None:
        if request.deadline_ms is not None and self._clock.now_ms() >= request.deadline_ms:
            raise DeadlineExceededError("the deadline passed while no replica was there") from error
        if self._clock.monotonic_s() >= give_up_s:
            raise ConnectionFailedError("the replica was lost and no other has room") from error


def _note(request: GenerationRequest, grant: Grant, answer: Answer, reason: str) -> None:
    extra = {
        "request_id": request.request_id,
        "replica_id": grant.replica_id,
        "tokens": len(answer.token_ids),
        "reason": reason,
    }
    logger.warning("generation goes on elsewhere", extra=extra)


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

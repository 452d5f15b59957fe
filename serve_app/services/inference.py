"""One model call: ask the router, talk to the replica, keep the bill.

Owns the way from a request to chunks for every surface. Carries no prompt to the router and no
token through it. Invariant: leaving the iterator early, for whatever reason, aborts the generation
down to the engine; a lost replica is seen by nobody who does not look at `Chunk.resumed`.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from serve_app.core.emitted import NOTHING, Emitted
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
VICTIMS_MAX = 3  # replicas lost in a row under one request: the request may be what kills them
RESUME_POLL_MIN_S = 0.05
RESUME_POLL_MAX_S = 0.5

logger = logging.getLogger(__name__)


class Inference:
    """Generation, wherever the router finds room, past the loss of replicas.

    Args:
        resume_wait_s: how long an answer that lost its replica waits for another, from one token
            to the next.
    """

    def __init__(
        self,
        admission: Admission,
        link: TokenLink,
        clock: Clock,
        resume_wait_s: float,
    ) -> None:
        self._admission = admission
        self._link = link
        self._clock = clock
        self._resume_wait_s = resume_wait_s

    async def generate(
        self,
        request: GenerationRequest,
        placement: Placement = ANYWHERE,
        emitted: Emitted = NOTHING,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer; every chunk carries the usage so far.

        A replica that is lost or drained on the way costs no token: see `core.resume`. Nor does a
        caller that was lost: with what it had `emitted`, the rest alone is streamed.

        Raises:
            ModelNotAvailableError: no such model.
            NoHostsAvailableError: no replica has room, and none was lost yet.
            ConnectionFailedError: the replica was lost, and no other took the rest in time.
            DeadlineExceededError: nor before the request's deadline.
            ServeAppError: what the engine answered.
        """
        answer = Answer(request, list(emitted.token_ids), len(emitted.text))
        patience = _Patience(self._clock, request.deadline_ms, self._resume_wait_s)
        lost: list[str] = []  # not to be chosen again, while there are others
        while not answer.is_complete:
            asked = answer.next_request()
            if answer.attempt_count == 1 and not answer.token_ids:
                grant = await self._admission.admit(admit_request(asked, placement))
            else:
                grant = await self._admit_again(asked, placement, lost, patience)
            known = len(answer.token_ids)
            try:
                async with aclosing(self._link.generate(grant, asked)) as chunks:
                    async for chunk in chunks:
                        fresh = answer.take(chunk)
                        if fresh is not None:
                            yield fresh
            except ConnectionFailedError as error:
                _note(request, grant, answer, str(error))
                if len(answer.token_ids) > known:
                    patience.renew()
                patience.count(grant.replica_id, error)
                lost.append(grant.replica_id)
                placement = replace(placement, host="")  # it is gone; the answer is not
            except DivergedError:
                _note(request, grant, answer, "the replay differed")
                answer.diverged()
            else:
                return
        yield answer.end()

    async def decisions(self, limit: int) -> Sequence[Decision]:
        """See `ports.Admission`."""
        return await self._admission.decisions(limit)

    async def _admit_again(
        self,
        request: GenerationRequest,
        placement: Placement,
        lost: list[str],
        patience: "_Patience",
    ) -> Grant:
        """A grant for the rest of an answer, as soon as there is one."""
        error: ServeAppError | None = None
        while True:
            await patience.wait(error)
            try:
                wanted = admit_request(request, placement, tuple(lost), is_resumed=True)
                return await self._admission.admit(wanted)
            except (NoHostsAvailableError, OverloadedError) as refusal:
                error = refusal
                lost.clear()  # where only the link broke, the same replica may be the best


class _Patience:
    """How long an answer that lost its replica is worth waiting for."""

    def __init__(self, clock: Clock, deadline_ms: int | None, wait_s: float) -> None:
        self._clock = clock
        self._deadline_ms = deadline_ms
        self._wait_s = wait_s
        self._victims: set[str] = set()
        self._give_up_s = clock.monotonic_s() + wait_s
        self._delay_s = 0.0

    def renew(self) -> None:
        """A token has come since."""
        self._victims.clear()

    def count(self, replica_id: str, error: ConnectionFailedError) -> None:
        """A replica was lost; raises the error when too many were, in a row."""
        if not self._victims:
            self._delay_s = 0.0
            self._give_up_s = self._clock.monotonic_s() + self._wait_s
        self._victims.add(replica_id)
        if len(self._victims) >= VICTIMS_MAX:
            raise error

    async def wait(self, error: ServeAppError | None) -> None:
        """Nothing the first time after a token, then longer and longer.

        Raises:
            DeadlineExceededError: the request's deadline is past.
            ConnectionFailedError: there was time enough.
        """
        if self._deadline_ms is not None and self._clock.now_ms() >= self._deadline_ms:
            raise DeadlineExceededError("the deadline passed while no replica was there") from error
        if self._clock.monotonic_s() >= self._give_up_s:
            raise ConnectionFailedError("the replica was lost and no other has room") from error
        await self._clock.sleep(self._delay_s)
        self._delay_s = min(max(2 * self._delay_s, RESUME_POLL_MIN_S), RESUME_POLL_MAX_S)


def _note(request: GenerationRequest, grant: Grant, answer: Answer, reason: str) -> None:
    extra = {
        "request_id": request.request_id,
        "replica_id": grant.replica_id,
        "tokens": len(answer.token_ids),
        "reason": reason,
    }
    logger.warning("generation goes on elsewhere", extra=extra)


def admit_request(
    request: GenerationRequest,
    placement: Placement = ANYWHERE,
    excluded: tuple[str, ...] = (),
    *,
    is_resumed: bool = False,
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
        session=request.session_key,
        priority=request.priority,
        deadline_ms=request.deadline_ms,
        placement=placement,
        is_resumed=is_resumed,
    )

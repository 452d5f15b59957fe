"""Sessions: conversations whose turns run one after the other and are kept whole.

Owns the workspace border, the waiting for a turn and its lease. Generates nothing: whoever holds a
turn does. Invariants: one turn of a session runs at a time, on whichever ingress; what a turn was
told of the session is still true when it is kept, or it is not kept.

Whoever waits asks again a few times a second, which is also what keeps its place: a process that
has died stops asking, and its turns leave the line when their lease runs out.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serve_app.core.errors import (
    RateLimitExceededError,
    ServeAppError,
    StaleLeaseError,
    UnknownSessionError,
)
from serve_app.core.inference import Message
from serve_app.core.session import (
    Session,
    SessionLimits,
    SessionMessage,
    check_room,
    conversation,
    session_id,
)
from serve_app.ports import Clock, Entropy, SessionStore, TurnLine

logger = logging.getLogger(__name__)

ASK_S = 0.02  # between the first questions whether it is one's turn …
ASK_MAX_S = 0.25  # … and between later ones
RENEWALS_PER_LEASE = 3  # so that one that is lost does no harm
LEAVE_WITHIN_S = 2.0  # otherwise the lease frees the place


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to say the next thing in a session."""

    session: Session
    id: str
    kept: tuple[SessionMessage, ...]

    def messages(self, prompt: str) -> tuple[Message, ...]:
        """What the model is asked."""
        return conversation(self.session, self.kept, prompt)


class Sessions:
    """The use cases over one store."""

    def __init__(
        self, store: SessionStore, clock: Clock, entropy: Entropy, limits: SessionLimits
    ) -> None:
        self._store = store
        self._clock = clock
        self._entropy = entropy
        self.limits = limits

    async def create(self, workspace: str, model: str, system: str) -> Session:
        """Begin a session; durable when this returns."""
        partition = int(self._entropy.uniform() * self._store.partition_count)
        now_ms = self._clock.now_ms()
        new_id = session_id(partition, self._entropy.token())
        session = Session(new_id, workspace, model, system, now_ms, now_ms)
        await self._store.create(session, self.limits.idle_ms)
        return session

    async def find(self, workspace: str, wanted_id: str) -> Session:
        """The session.

        Raises:
            UnknownSessionError: there is none in this workspace, or it has ended.
        """
        session = await self._store.find(wanted_id)
        if session is None or session.workspace != workspace:
            raise UnknownSessionError("no such session in this workspace, or it has ended")
        return session

    async def end(self, workspace: str, wanted_id: str) -> None:
        """Forget a session; a turn that is running ends as soon as it notices.

        Raises:
            UnknownSessionError: as `find`.
        """
        await self.find(workspace, wanted_id)
        await self._store.end(wanted_id)

    async def messages(self, session: Session, start: int, limit: int) -> Sequence[SessionMessage]:
        """Messages from index `start` on, at most `limit`; the system message is the first."""
        if not session.system:
            return await self._store.messages(session.id, start, limit)
        if start > 0:
            return await self._store.messages(session.id, start - 1, limit)
        system = SessionMessage("system", session.system, session.created_at_ms)
        return (system, *await self._store.messages(session.id, 0, limit - 1))

    @asynccontextmanager
    async def turn(self, workspace: str, wanted_id: str, prompt: str) -> AsyncIterator[Turn]:
        """Wait until it is this prompt's turn, and hold it.

        Raises:
            UnknownSessionError: as `find`; also from within, when the session ends meanwhile.
            RateLimitExceededError: too many turns wait already.
            InvalidPromptError: the session has no room for it.
            StaleLeaseError: from within: the lease was lost; nothing of this turn is kept.
        """
        await self.find(workspace, wanted_id)
        turn_id = self._entropy.token()
        try:
            await self._stand_in_line(wanted_id, turn_id)
            session = await self.find(workspace, wanted_id)
            check_room(session, prompt, self.limits)
            kept = await self._store.messages(wanted_id, 0, self.limits.messages_max)
            async with self._renewed(wanted_id, turn_id):
                yield Turn(session, turn_id, tuple(kept))
        finally:
            await self._leave(wanted_id, turn_id)

    async def keep(self, turn: Turn, prompt: str, answer: str) -> None:
        """Keep a turn that has succeeded.

        Raises:
            UnknownSessionError: the session has ended meanwhile.
            StaleLeaseError: the lease was lost.
        """
        now_ms = self._clock.now_ms()
        said = SessionMessage("user", prompt, now_ms), SessionMessage("assistant", answer, now_ms)
        line = await self._store.keep(turn.session.id, turn.id, said, self.limits.idle_ms)
        _check(line)

    async def _stand_in_line(self, wanted_id: str, turn_id: str) -> None:
        line = await self._store.join(wanted_id, turn_id, self.limits)
        delay_s = ASK_S
        while line is not TurnLine.RUNNING:
            _check(line)
            await self._clock.sleep(delay_s)
            delay_s = min(2 * delay_s, ASK_MAX_S)
            line = await self._store.hold(wanted_id, turn_id, self.limits)

    @asynccontextmanager
    async def _renewed(self, wanted_id: str, turn_id: str) -> AsyncIterator[None]:
        """Renew the lease meanwhile; what goes wrong with it ends what runs under it."""
        try:
            async with asyncio.TaskGroup() as group:
                renewal = group.create_task(self._renew(wanted_id, turn_id))
                try:
                    yield
                finally:
                    renewal.cancel()
        except BaseExceptionGroup as errors:
            # One of the two has failed; the other was cancelled because of it.
            raise errors.exceptions[0] from None

    async def _renew(self, wanted_id: str, turn_id: str) -> None:
        while True:
            await self._clock.sleep(self.limits.lease_ms / 1000 / RENEWALS_PER_LEASE)
            _check(await self._store.hold(wanted_id, turn_id, self.limits))

    async def _leave(self, wanted_id: str, turn_id: str) -> None:
        try:
            async with asyncio.timeout(LEAVE_WITHIN_S):
                await self._store.leave(wanted_id, turn_id)
        except (TimeoutError, ServeAppError) as error:
            logger.warning("a turn's place is left to its lease", extra={"reason": str(error)})


def _check(line: TurnLine) -> None:
    match line:
        case TurnLine.FULL:
            raise RateLimitExceededError("too many turns of this session wait already")
        case TurnLine.ENDED:
            raise UnknownSessionError("the session has ended")
        case TurnLine.LOST:
            raise StaleLeaseError("the session's turn was lost; nothing of it is kept")
        case TurnLine.RUNNING | TurnLine.WAITING:
            return

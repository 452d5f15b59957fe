"""Admission over links of its own: one frame to the router that queues for the model, one back.

Owns both ends and the layout of the items. Does not know which router that is (`serve_admission`
does) and decides nothing (`services.routing` does). Invariant: whoever no longer waits for an
answer, because it was cancelled or its connection broke, no longer waits in the router's queue.
"""

import asyncio
import logging
from dataclasses import astuple
from functools import partial

from serve_app.adapters.tcp_link_peers import (
    AcceptedLink,
    Address,
    CallingLink,
    LinkContext,
    Links,
    LinkServer,
)
from serve_app.adapters.tcp_link_wire import (
    Answer,
    Call,
    Item,
    LinkSettings,
    WireError,
    answer_error,
    pack_frame,
    pack_item,
    read_error,
)
from serve_app.core.errors import (
    ConnectionFailedError,
    InvalidRequestError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.inference import AdmitRequest, Grant, Placement
from serve_app.ports import Admit, Clock, Entropy

PEER = "router"

logger = logging.getLogger(__name__)


class AdmissionLink:
    """Asks routers, wherever they listen; one per process and event loop."""

    def __init__(
        self, secret: bytes, clock: Clock, entropy: Entropy, settings: LinkSettings | None = None
    ) -> None:
        context = LinkContext(secret, clock, entropy, settings or LinkSettings())
        self._links = Links(partial(_Asking, context), PEER, context)

    async def admit(self, router: Address, request: AdmitRequest) -> Grant:
        """Ask one router; a caller that is cancelled no longer waits there.

        Raises:
            ConnectionFailedError: it cannot be reached, or was lost before it answered.
            ServeAppError: what it answered, see `ports.Admission`.
        """
        link = await self._links.get(router)
        return await link.ask(request)

    async def close(self) -> None:
        """Break every connection off; who waits gets `ConnectionFailedError`."""
        await self._links.close()


class AdmissionServer(LinkServer["_Answering"]):
    """Lets any number of clients that know the cluster secret ask one router.

    Args:
        asked_max: requests of one connection that may wait.
    """

    def __init__(
        self,
        admit: Admit,
        secret: bytes,
        clock: Clock,
        entropy: Entropy,
        *,
        asked_max: int,
        settings: LinkSettings | None = None,
    ) -> None:
        super().__init__(LinkContext(secret, clock, entropy, settings or LinkSettings()))
        self.admit = admit
        self.asked_max = asked_max

    def accept(self) -> "_Answering":
        """See `LinkServer`."""
        return _Answering(self)


class _Asking(CallingLink):
    def __init__(self, context: LinkContext) -> None:
        super().__init__(context, PEER)
        self._waiting: dict[int, asyncio.Future[Grant]] = {}
        self._count = 0

    async def ask(self, request: AdmitRequest) -> Grant:
        if self.is_closed:
            raise ConnectionFailedError(self.reason)
        number = self._count
        try:
            packed = pack_item(call_admit(number, request))
        except ValueError as error:
            raise InvalidRequestError(f"the request cannot be sent: {error}") from error
        self._count += 1
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self.push(packed)
        try:
            return await answer
        finally:
            if self._waiting.pop(number, None) is not None and not self.is_closed:
                self.push(pack_item([Call.CANCEL, number]))

    def closed(self) -> None:
        super().closed()
        waiting, self._waiting = tuple(self._waiting.values()), {}
        for answer in waiting:
            if not answer.done():
                answer.set_exception(ConnectionFailedError(f"lost the router: {self.reason}"))

    def handle(self, item: Item) -> None:
        match item:
            case [Answer.GRANT, number, [*members]]:
                grant = _read_grant(members)  # first: should it break the link, the caller is told
                answer = self._waiting.pop(number, None)
                if answer is not None and not answer.done():
                    answer.set_result(grant)
            case [Answer.ERROR, number, str(code), str(message)]:
                answer = self._waiting.pop(number, None)
                if answer is not None and not answer.done():
                    answer.set_exception(read_error(code, message))
            case [Answer.PONG]:
                pass  # data_received has noted that the peer lives
            case _:
                raise WireError("an item of an unknown kind")


class _Answering(AcceptedLink):
    def __init__(self, server: AdmissionServer) -> None:
        super().__init__(server)
        self._server = server
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._outbox: list[Item] = []

    @property
    def is_busy(self) -> bool:
        return bool(self._asked)

    def closed(self) -> None:
        super().closed()
        for task in self._asked.values():
            task.cancel()

    def handle(self, item: Item) -> None:
        match item:
            case [Call.ADMIT, int(number), [*_]]:
                self._take(number, read_admit(item))
            case [Call.CANCEL, number]:
                if (task := self._asked.get(number)) is not None:
                    task.cancel()
            case [Call.PING]:
                self._answer([Answer.PONG])
            case _:
                raise WireError("an item of an unknown kind")

    def flush(self) -> None:
        items, self._outbox = self._outbox, []
        if items:
            self.send(pack_frame(items))

    def _take(self, number: int, request: AdmitRequest) -> None:
        if number in self._asked:
            raise WireError("a number is in use")
        if len(self._asked) >= self._server.asked_max:
            error = OverloadedError("the router has too many requests; try again later")
            self._answer(answer_error(number, error))
            return
        # Each ends with its answer, its caller's cancel, or the connection.
        task = asyncio.create_task(self._admit(number, request))  # noqa: TID251
        self._asked[number] = task
        # Not in the task: one that is cancelled before its first turn never runs.
        task.add_done_callback(lambda _: self._asked.pop(number))

    async def _admit(self, number: int, request: AdmitRequest) -> None:
        try:
            grant = await self._server.admit(request)
            self._answer([Answer.GRANT, number, astuple(grant)])
        except ServeAppError as error:
            self._answer(answer_error(number, error))
        except Exception:
            logger.exception("admission failed")
            self._answer(answer_error(number, ServeAppError("the router failed on this request")))

    def _answer(self, item: Item) -> None:
        self._outbox.append(item)
        self.schedule_flush()


def call_admit(number: int, request: AdmitRequest) -> Item:
    """The item that asks for a grant."""
    members = [
        request.request_id,
        request.model,
        request.token_count,
        request.excluded,
        request.prompt_tokens,
        request.prefix,
        request.tenant,
        request.session,
        request.priority,
        request.deadline_ms,
        astuple(request.placement),
        request.is_resumed,
    ]
    return [Call.ADMIT, number, members]


def read_admit(item: Item) -> AdmitRequest:
    """The request of an asking item.

    Raises:
        WireError: it has another layout.
    """
    try:
        request_id, model, token_count, excluded, prompt_tokens, prefix, *rest = item[2]
        tenant, session, priority, deadline_ms, placement, is_resumed = rest
        return AdmitRequest(
            request_id,
            model,
            token_count,
            tuple(excluded),
            prompt_tokens,
            tuple(prefix),
            tenant,
            session,
            priority,
            deadline_ms,
            Placement(*placement),
            is_resumed,
        )
    except (TypeError, ValueError) as error:
        raise WireError("an admission item has another layout") from error


def _read_grant(members: Item) -> Grant:
    try:
        return Grant(*members)
    except TypeError as error:
        raise WireError("a grant has another layout") from error

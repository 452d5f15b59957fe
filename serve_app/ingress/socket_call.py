"""One request of a socket: what it asks, what has come of it, what it costs.

Owns no I/O: `compat/websocket.py` runs it. Invariant: a call is wasted until it is known to be
complete, so that a client that leaves at any moment is billed rightly.
"""

import asyncio
from dataclasses import dataclass, field

from inferpipe.wire import SocketInference
from serve_app.core.auth import Principal
from serve_app.core.errors import ErrorCode, ServeAppError
from serve_app.core.inference import (
    NO_USAGE,
    Chunk,
    FinishReason,
    GenerationRequest,
    Message,
    Resumed,
    Usage,
)
from serve_app.core.usage import Spending, Waste
from serve_app.ingress.socket_messages import (
    Json,
    broken_piece,
    end_message,
    failure_message,
    piece_message,
)

LEDGER_NAME = "websocket"  # what stands for a workflow in the usage ledger


@dataclass(slots=True)
class SocketCall:
    """One request of a socket.

    Args:
        id: nobody else's; the engine and the ledger know it by this.
        request_id: the client's name for it.
        has_spoken: the client has seen a piece.
        pieces: the answer so far.
        waste: why its tokens come to nothing; None: they do not.
    """

    id: str
    request_id: str | None
    wish: SocketInference
    principal: Principal
    task: asyncio.Task[None] | None = None
    is_started: bool = False
    is_cancelled: bool = False
    has_spoken: bool = False
    usage: Usage = NO_USAGE
    finish_reason: FinishReason | None = None
    resumed: Resumed | None = None
    pieces: list[str] = field(default_factory=list)
    waste: Waste | None = Waste.CANCELLED

    @property
    def is_complete(self) -> bool:
        """Whether the answer has come to its natural end."""
        return self.finish_reason not in {None, FinishReason.CANCELLED}

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.pieces)

    def generation(self, messages: tuple[Message, ...], deadline_ms: int) -> GenerationRequest:
        """What the engine is asked."""
        wish = self.wish
        return GenerationRequest(
            request_id=self.id,
            messages=messages,
            model=wish.model,
            max_tokens=wish.max_tokens,
            temperature=wish.temperature,
            top_p=wish.top_p,
            tenant=self.principal.workspace,
            session=wish.session_id or "",
            stop=(wish.stop,) if isinstance(wish.stop, str) else wish.stop,
            deadline_ms=deadline_ms,
        )

    def take(self, chunk: Chunk) -> None:
        """Note what has come."""
        self.usage = chunk.usage or self.usage
        self.pieces.append(chunk.text)
        self.finish_reason = chunk.finish_reason
        self.resumed = chunk.resumed or self.resumed

    def ended(self) -> list[Json]:
        """The messages of an answer that the engine has ended."""
        self.waste = None if self.is_complete else Waste.FAILED
        reason = self.finish_reason or FinishReason.CANCELLED
        content = self.pieces[-1] if self.wish.stream and self.pieces else self.text
        # The engine's giving up is no reason that a chunk can have.
        shown = reason if self.is_complete else None
        last = piece_message(self.request_id, content, shown)
        return [last, end_message(self.request_id, self.usage, reason, self.resumed)]

    def cancelled(self) -> list[Json]:
        """The message of an answer that its client has cancelled."""
        self.waste = Waste.CANCELLED
        reason = FinishReason.CANCELLED
        return [end_message(self.request_id, self.usage, reason, self.resumed)]

    def failed(self, error: ServeAppError) -> list[Json]:
        """An error, after a last piece that says so where the client has seen others."""
        self.waste = Waste.TIMED_OUT if error.code is ErrorCode.TIMEOUT else Waste.FAILED
        failure = failure_message(self.request_id, self.usage, error)
        return [broken_piece(self.request_id), failure] if self.has_spoken else [failure]

    def spending(self, now_ms: int) -> Spending:
        """Its entry in the ledger."""
        return Spending(
            id=self.id,
            workspace=self.principal.workspace,
            workflow_id=LEDGER_NAME,
            key_id=self.principal.key_id,
            at_ms=now_ms,
            usage=self.usage,
            wasted_tokens=self.usage.total_tokens if self.waste else 0,
            waste=self.waste,
        )

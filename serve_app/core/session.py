"""A conversation that is kept: its turns, its bounds, and who may speak next.

Owns what a session is and when it has room for a turn. Does not know the store or the model.
Invariant: turns are kept whole and in order, a question with its answer; a turn that failed leaves
nothing behind.
"""

from dataclasses import dataclass

from serve_app.core.errors import InvalidPromptError
from serve_app.core.inference import Message
from serve_app.core.journal import marked_partition

ID_PREFIX = "ses_"


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one session may hold and how long it is kept.

    Args:
        messages_max: questions and answers together; a turn adds two.
        bytes_max: of their text, as UTF-8. One answer may go over it: its size is not known before.
        idle_ms: a session without a turn for so long is gone.
        waiting_max: turns that wait for the one that runs.
        lease_ms: a turn whose process has died holds the others up for so long at most.
    """

    messages_max: int = 200
    bytes_max: int = 1 << 20
    idle_ms: int = 86_400_000
    waiting_max: int = 8
    lease_ms: int = 5_000


@dataclass(frozen=True, slots=True)
class Session:
    """What is known of a session but its messages.

    Args:
        model: an id of `/v1/models`; every turn runs on it.
        system: the system message; empty: none.
        message_count, byte_count: of what its turns have left.
    """

    id: str
    workspace: str
    model: str
    system: str
    created_at_ms: int
    used_at_ms: int
    message_count: int = 0
    byte_count: int = 0


@dataclass(frozen=True, slots=True)
class SessionMessage:
    """One message as it is kept."""

    role: str
    content: str
    at_ms: int


def session_id(partition: int, token: str) -> str:
    """An id that names its partition (two hex digits)."""
    return f"{ID_PREFIX}{partition:02x}{token}"


def session_partition(a_session_id: str, partition_count: int) -> int | None:
    """The partition an id names; None when it is not an id of this cluster."""
    return marked_partition(a_session_id, ID_PREFIX, partition_count)


def check_room(session: Session, prompt: str, limits: SessionLimits) -> None:
    """Refuse a turn for which there is no room.

    Nothing is dropped to make some: the model would forget without saying so, and the replica's
    cached prefix would be worth nothing.

    Raises:
        InvalidPromptError: naming the bound.
    """
    if session.message_count + 2 > limits.messages_max:
        raise InvalidPromptError(
            f"the session holds {session.message_count} of {limits.messages_max} messages; "
            "end it and begin another"
        )
    byte_count = session.byte_count + len(prompt.encode())
    if byte_count > limits.bytes_max:
        raise InvalidPromptError(
            f"with this prompt the session holds {byte_count} bytes of at most "
            f"{limits.bytes_max}; end it and begin another"
        )


def conversation(
    session: Session, kept: tuple[SessionMessage, ...], prompt: str
) -> tuple[Message, ...]:
    """What the model is asked: the system message, the turns so far, the prompt."""
    system = (Message("system", session.system),) if session.system else ()
    turns = tuple(Message(message.role, message.content) for message in kept)
    return (*system, *turns, Message("user", prompt))

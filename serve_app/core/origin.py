"""What an execution came from, and why it may not run; persisted with its acceptance.

Owns two values of `ExecutionCreated`. Invariant: members may be added with a default, never
renamed.
"""

from dataclasses import dataclass

from serve_app.core.inference import JsonValue


@dataclass(frozen=True, slots=True)
class Origin:
    """What triggered an execution; its data is the execution's input.

    Args:
        kind: `event`.
        id: the event's.
        name: the event's.
        ts: when it happened, Unix ms.
        user: about whom, as its sender says.
    """

    kind: str
    id: str
    name: str
    ts: int
    user: JsonValue = None

    def shown(self, data: JsonValue) -> dict[str, JsonValue]:
        """What expressions see as `event`."""
        members: dict[str, JsonValue] = {"id": self.id, "name": self.name, "ts": self.ts}
        user = {} if self.user is None else {"user": self.user}
        return {**members, **user, "data": data}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an accepted execution ends without having run: nobody waited who could be told."""

    code: str
    message: str

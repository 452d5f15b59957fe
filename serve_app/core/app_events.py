"""Events of applications: what starts workflows and answers waiting steps.

Owns an event's form, its ids, and the message that carries it. Starts nothing (`triggers` says what
an event starts). Invariant: an event lives in the partition of its workspace and name, its *topic*,
so that who waits for it and what was sent meet in one slot; whoever sends the same id to a topic
within a day sends nothing.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

from serve_app.core.inference import JsonValue
from serve_app.core.journal import Outgoing, partition_for

EVENT_LOG = "event"  # messages that bring an event to its topic
FAN_OUT_LOG = "event.out"  # from a topic to whoever carries the event out
HEARD_LOG = "event.heard"  # an event of the log, for one subscriber who came after it
CARRIED_OUT_LOGS = frozenset({FAN_OUT_LOG, HEARD_LOG})
EVENT_ID_MAX = 256
EVENT_NAME_MAX = 200
HOOK_PREFIX = "inferpipe/hook."  # of an event that a workflow's hook took in
# Names of the server's own events: ours, and those that Inngest's SDK knows as such.
RESERVED_PREFIXES = ("inferpipe/", "inngest/")
HOPS_MAX = 20  # events that start executions that emit events; more is a circle


@dataclass(frozen=True, slots=True)
class AppEvent:
    """Something that happened in an application.

    Args:
        ts: when, Unix ms, as its sender says.
        user: about whom, as its sender says.
        execution_id: whose step emitted it.
        key_id: of the key that sent it; executions that it starts are booked there.
        hops: how many executions in a row were started by events before it.
    """

    workspace: str
    name: str
    id: str
    data: JsonValue
    ts: int
    user: JsonValue = None
    execution_id: str | None = None
    key_id: str | None = None
    hops: int = 0

    def shown(self) -> dict[str, JsonValue]:
        """What expressions see as `event`."""
        members: dict[str, JsonValue] = {"id": self.id, "name": self.name, "ts": self.ts}
        user = {} if self.user is None else {"user": self.user}
        return {**members, **user, "data": self.data}


def event_name_problem(name: object) -> str | None:
    """Why this is no name of an event, or None."""
    if not isinstance(name, str) or not 0 < len(name) <= EVENT_NAME_MAX:
        return f"is text of 1 to {EVENT_NAME_MAX} characters"
    if not name.isprintable() or " " in name or "*" in name:
        return "has no spaces, no control characters and no *"
    if name.startswith(RESERVED_PREFIXES):
        return f"does not begin with {' or '.join(RESERVED_PREFIXES)}: those names are reserved"
    return None


def derived_event_id(*parts: str) -> str:
    """The id that the same parts always give."""
    return f"evt_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def topic_partition(partition_count: int, workspace: str, name: str) -> int:
    """Where a topic lives."""
    return partition_for(partition_count, f"{workspace}\0{name}")


def event_message(event: AppEvent, partition_count: int) -> Outgoing:
    """The message that brings an event to its topic; its id tells a repeat."""
    target = topic_partition(partition_count, event.workspace, event.name)
    message_id = f"event/{event.workspace}/{event.name}/{event.id}"
    log = f"{EVENT_LOG}:{event.workspace}:{event.name}"
    body = json.dumps(asdict(event), ensure_ascii=False, separators=(",", ":")).encode()
    return Outgoing(message_id, target, log, body)

"""What starts a workflow by itself, and what stops an execution: triggers and `cancelOn` as values.

Owns their meaning. Parses no definition (`trigger_definition` does) and starts nothing. Invariant:
an execution that a trigger starts has an id derived from what triggered it, so that whoever
carries it out again starts nothing again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from serve_app.core.app_events import HOOK_PREFIX, RESERVED_PREFIXES
from serve_app.core.errors import StepFailedError
from serve_app.core.inference import JsonValue
from serve_app.core.journal import derived_execution_id

Evaluate = Callable[[str, Mapping[str, object]], object]

WILDCARD = "*"


@dataclass(frozen=True, slots=True)
class EventTrigger:
    """An event starts it.

    Args:
        event: a name, or the beginning of one and `*`.
        condition: CEL over `event`; None: any event of the name.
    """

    event: str
    condition: str | None = None

    def takes(self, name: str) -> bool:
        """Whether events of this name are meant."""
        if name.startswith(RESERVED_PREFIXES):
            return False
        if self.event.endswith(WILDCARD):
            return name.startswith(self.event[: -len(WILDCARD)])
        return name == self.event


class CatchUp(StrEnum):
    """What becomes of due times that passed while nobody could start anything."""

    SKIP = "skip"
    LATEST = "latest"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class CronTrigger:
    """A clock starts it.

    Args:
        cron: five fields: minute, hour, day of month, month, day of week.
        timezone: of the IANA data base; the fields are read on a clock there.
    """

    cron: str
    timezone: str = "UTC"
    catch_up: CatchUp = CatchUp.LATEST


class HookScheme(StrEnum):
    """How a webhook that comes in is signed."""

    STANDARD = "standard"
    GITHUB = "github"

    @property
    def header(self) -> str:
        """The header that has the signature."""
        is_standard = self is HookScheme.STANDARD
        return "webhook-signature" if is_standard else "x-hub-signature-256"


@dataclass(frozen=True, slots=True)
class HookTrigger:
    """A webhook to the workflow's own address starts it."""

    scheme: HookScheme
    condition: str | None = None


Trigger = EventTrigger | CronTrigger | HookTrigger


@dataclass(frozen=True, slots=True)
class CancelOn:
    """An event cancels its executions.

    Args:
        event: a name.
        condition: CEL over `event`, `input` and `execution`; None: any event of the name.
    """

    event: str
    condition: str | None = None


def is_started_by(
    workflow_id: str,
    triggers: tuple[Trigger, ...],
    event: dict[str, JsonValue],
    evaluate: Evaluate,
) -> bool:
    """Whether one of the triggers takes an event, as expressions see it.

    A condition without a value, or with another than true and false, takes nothing.
    """
    name = event["name"]
    assert isinstance(name, str), "every event has one"
    for trigger in triggers:
        if isinstance(trigger, CronTrigger):
            continue
        is_meant = (
            trigger.takes(name)
            if isinstance(trigger, EventTrigger)
            else name == HOOK_PREFIX + workflow_id
        )
        if is_meant and holds(trigger.condition, {"event": event}, evaluate):
            return True
    return False


def holds(condition: str | None, scope: dict[str, object], evaluate: Evaluate) -> bool:
    """Whether a condition is true; where it has no value it is not."""
    if condition is None:
        return True
    try:
        return evaluate(condition, scope) is True
    except StepFailedError:
        return False


def started_by_event(partition_count: int, workspace: str, event_id: str, workflow_id: str) -> str:
    """The id of the execution of a workflow that an event starts."""
    return derived_execution_id(partition_count, "event", workspace, event_id, workflow_id)


def started_by_clock(partition_count: int, workspace: str, workflow_id: str, due_ms: int) -> str:
    """The id of the execution of a workflow that is due at a time."""
    return derived_execution_id(partition_count, "cron", workspace, workflow_id, str(due_ms))

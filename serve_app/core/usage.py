"""What was used, by whom: the entries of the ledger and their sums.

Owns what one entry says and how entries are added up. Keeps nothing: the store counts an execution
in the commit that ends it, so it is counted once, however often that commit is sent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from enum import StrEnum

from serve_app.core.execution import Execution, Status
from serve_app.core.inference import NO_USAGE, Usage

TIMED_OUT = "TIMEOUT"


class Waste(StrEnum):
    """Why tokens came to nothing."""

    RETRIED = "retried"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class GroupBy(StrEnum):
    """What a report has one item for."""

    WORKFLOW = "workflow"
    KEY = "key"
    DAY = "day"


@dataclass(frozen=True, slots=True)
class Spending:
    """One execution, or one call of a surface that needs none.

    Args:
        id: of the execution or call; a second entry of the same id counts nothing.
        workflow_id: or what stands for one, such as "openai:chat".
        key_id: of the key that asked; empty where it is not known.
        at_ms: when it ended, Unix epoch.
        usage: of all attempts, wasted ones included.
        wasted_tokens: prompt and completion tokens of attempts that gave no result.
        waste: why, where there are any.
    """

    id: str
    workspace: str
    workflow_id: str
    key_id: str
    at_ms: int
    usage: Usage = NO_USAGE
    wasted_tokens: int = 0
    waste: Waste | None = None

    @property
    def day(self) -> str:
        """The UTC day it counts for, as YYYY-MM-DD."""
        return day_of(self.at_ms).isoformat()


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one workflow and key used on one day; `wasted` is by reason."""

    day: str
    workflow_id: str
    key_id: str
    requests: int = 0
    usage: Usage = NO_USAGE
    wasted: Mapping[str, int] = field(default_factory=dict)


def spending_of(execution: Execution) -> Spending:
    """The entry of an execution that has ended."""
    assert execution.completed_at_ms is not None, "it has ended"
    created = execution.created
    wasted = execution.wasted_tokens
    return Spending(
        id=execution.id,
        workspace=created.workspace,
        workflow_id=created.workflow_id,
        key_id=created.key_id or "",
        at_ms=execution.completed_at_ms,
        usage=execution.usage,
        wasted_tokens=wasted,
        waste=_waste(execution) if wasted else None,
    )


def day_of(at_ms: int) -> date:
    """The UTC day of a moment."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).date()


def grouped(rows: Iterable[UsageRow], by: GroupBy) -> dict[str, UsageRow]:
    """Sums by workflow, key or day, in the order of their names."""
    sums: dict[str, UsageRow] = {}
    for row in rows:
        name = {
            GroupBy.WORKFLOW: row.workflow_id,
            GroupBy.KEY: row.key_id,
            GroupBy.DAY: row.day,
        }[by]
        sums[name] = _added(sums.get(name, UsageRow(row.day, row.workflow_id, row.key_id)), row)
    return dict(sorted(sums.items()))


def total(rows: Iterable[UsageRow]) -> UsageRow:
    """The sum of all rows."""
    summed = UsageRow("", "", "")
    for row in rows:
        summed = _added(summed, row)
    return summed


def _added(left: UsageRow, right: UsageRow) -> UsageRow:
    reasons = {**left.wasted, **right.wasted}
    wasted = {name: left.wasted.get(name, 0) + right.wasted.get(name, 0) for name in reasons}
    return replace(
        left,
        requests=left.requests + right.requests,
        usage=left.usage + right.usage,
        wasted=wasted,
    )


def _waste(execution: Execution) -> Waste:
    if execution.status is Status.CANCELLED:
        return Waste.CANCELLED
    if execution.status is Status.FAILED:
        return Waste.TIMED_OUT if execution.error_code == TIMED_OUT else Waste.FAILED
    return Waste.RETRIED

"""What the world outside saw: accepted executions, calls, webhooks, streams, signals, faults.

It is kept by the driver, apart from the store under test, and written to a file line by line, so
that a run can be looked into afterwards. `judge` compares it with the journals.
"""

import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.chaos.generator import Planned
from tests.support.checker import Entry


@dataclass
class Call:
    """One request that reached the receiver, under its idempotency key."""

    key: str
    body: bytes
    at_s: float


@dataclass
class Hook:
    """One webhook delivery that reached the receiver."""

    message_id: str
    execution_id: str
    kind: str


@dataclass
class TakeOver:
    """How long an execution stood without a working owner.

    Args:
        kind: of the fault that took its owner.
        is_alone: no other fault was under way meanwhile.
        took_s: until another owner's first commit.
    """

    kind: str
    is_alone: bool
    took_s: float


@dataclass
class Ledger:
    """All of one run."""

    path: Path
    accepted: dict[str, Planned] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)  # sent, and maybe accepted
    calls: list[Call] = field(default_factory=list)
    hooks: list[Hook] = field(default_factory=list)
    views: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    signalled: list[tuple[str, str]] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    cancel_tried: set[str] = field(default_factory=set)  # sent, and maybe taken
    faults: Counter[str] = field(default_factory=Counter)
    take_overs: list[TakeOver] = field(default_factory=list)
    accept_s: list[float] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._file = self.path.open("a", encoding="utf-8")
        self._begun_s = time.monotonic()

    def write(self, what: str, **members: Any) -> None:
        """Add a line to the file."""
        at_s = round(time.monotonic() - self._begun_s, 3)
        self._file.write(json.dumps({"at_s": at_s, "what": what, **members}, default=str) + "\n")

    def close(self) -> None:
        self._file.close()

"""Whether a journal keeps the promises of the README: the judge of every chaos and integration run.

A journal is all of an execution's events, read past the API. A view is what one reader was shown,
with its resumptions. Every function returns what is wrong in words; nothing wrong is an empty list.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from serve_app.core.execution import KIND_OF
from serve_app.core.journal import StoredEvent

TERMINAL_KINDS = frozenset({"execution.completed", "execution.failed", "execution.cancelled"})
ENDED_KINDS = frozenset({"step.completed", "step.skipped", "step.failed"})
# What clients are shown; the others are the service's own bookkeeping.
SHOWN_KINDS = TERMINAL_KINDS | {
    "execution.started",
    "step.started",
    "step.retrying",
    "step.completed",
    "chunk",
}


@dataclass(frozen=True)
class Entry:
    """One event, wherever it was read."""

    seq: int
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


def entries_of_stored(stored: Iterable[StoredEvent]) -> list[Entry]:
    """A journal as `ExecutionStore.read` gives it."""
    return [Entry(one.seq, KIND_OF[type(one.event)], asdict(one.event)) for one in stored]


def entries_of_stream(rows: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[Entry]:
    """A journal as it lies in the store: the rows of its stream."""
    return [
        Entry(int(row_id.split(b"-")[0]), members[b"k"].decode(), orjson.loads(members[b"d"]))
        for row_id, members in rows
    ]


def journal_problems(journal: Sequence[Entry]) -> list[str]:
    """What is wrong with the whole journal of an execution that should have ended."""
    problems = []
    seqs = [entry.seq for entry in journal]
    if seqs != list(range(1, len(journal) + 1)):
        problems.append(f"sequence numbers are not contiguous from 1: {_gaps(seqs)}")
    if not journal or journal[0].kind != "execution.created":
        problems.append("it does not begin with its creation")
    terminals = [entry for entry in journal if entry.kind in TERMINAL_KINDS]
    if len(terminals) != 1:
        problems.append(f"{len(terminals)} terminal events instead of one")
    elif journal[-1] is not terminals[0]:
        problems.append("events follow the terminal one")
    has_completed = any(entry.kind == "execution.completed" for entry in terminals)
    step_ids = {entry.data["step_id"] for entry in journal if "step_id" in entry.data}
    for step_id in sorted(step_ids):
        events = [entry for entry in journal if entry.data.get("step_id") == step_id]
        must_end_well = has_completed and "/" not in step_id
        problems += [f"step {step_id}: {text}" for text in _step_problems(events, must_end_well)]
        if has_completed and not any(entry.kind in ENDED_KINDS for entry in events):
            problems.append(f"step {step_id}: it never ended")
    return problems


def view_problems(view: Sequence[Entry], journal: Sequence[Entry]) -> list[str]:
    """What is wrong with what a reader was shown, all connections together."""
    count = loss_and_repetition(view, journal)
    problems = [f"{count.lost} lost"] * bool(count.lost)
    problems += [f"{count.repeated} repeated"] * bool(count.repeated)
    if [entry.seq for entry in view] != sorted(entry.seq for entry in view):
        problems.append("out of order")
    kinds = {entry.seq: entry.kind for entry in journal}
    problems += [
        f"event {entry.seq} is {entry.kind} here and {kinds.get(entry.seq)} in the journal"
        for entry in view
        if kinds.get(entry.seq) != entry.kind
    ]
    return problems


@dataclass(frozen=True)
class Count:
    """Events that a reader missed, and those it was shown more than once."""

    expected: int
    lost: int
    repeated: int


def loss_and_repetition(view: Sequence[Entry], journal: Sequence[Entry]) -> Count:
    """Compare a reader's events with those that every reader should be shown."""
    expected = {entry.seq for entry in journal if entry.kind in SHOWN_KINDS}
    seen = Counter(entry.seq for entry in view)
    repeated = sum(times - 1 for times in seen.values())
    return Count(len(expected), len(expected - set(seen)), repeated)


def _step_problems(events: Sequence[Entry], must_end_well: bool) -> list[str]:
    problems = []
    kinds = [entry.kind for entry in events]
    completed = kinds.count("step.completed")
    if completed > 1:
        problems.append(f"completed {completed} times")
    if must_end_well and completed + kinds.count("step.skipped") != 1:
        problems.append("the execution completed without its one result")
    if completed and kinds[-1] != "step.completed":
        problems.append(f"{kinds[-1]} follows its completion")
    attempts = [entry.data["attempt"] for entry in events if entry.kind == "step.started"]
    if attempts != sorted(attempts) or set(attempts) != set(range(1, len(set(attempts)) + 1)):
        problems.append(f"attempts are not counted from 1: {attempts}")
    return problems + _chunk_problems(events)


def _chunk_problems(events: Sequence[Entry]) -> list[str]:
    """A step that answers with text has emitted exactly that text since its last start."""
    text = None
    for entry in events:
        if entry.kind == "step.started":
            text = ""
        elif entry.kind == "chunk":
            if text is None:
                return ["a chunk outside of an attempt"]
            text += entry.data["text"]
        elif entry.kind in ("step.retrying", "step.failed"):
            text = None
        elif entry.kind == "step.completed":
            output = entry.data["output"]
            if isinstance(output, str) and text and text.strip() != output.strip():
                return ["its chunks do not add up to its output"]
    return []


def _gaps(seqs: Sequence[int]) -> str:
    odd = [
        f"{left} then {right}"
        for left, right in zip([0, *seqs], seqs, strict=False)
        if right != left + 1
    ]
    return ", ".join(odd[:5])

"""Journals that releases wrote, in tests/replay: this release reads them and sees the same.

Each folder is a release, each line of a file one stored event. A file is never edited or removed;
a new kind of event or a new member comes with a new journal, in a folder of its release.
"""

import json
from pathlib import Path

import pytest

from serve_app.adapters.event_codec import decode_stored
from serve_app.core.execution import (
    KIND_OF,
    KINDS,
    Execution,
    ExecutionCreated,
    evolve,
    new_execution,
)
from serve_app.core.journal import StoredEvent
from serve_app.ingress.views import record_view

JOURNALS = sorted((Path(__file__).parents[1] / "replay").glob("*/*.jsonl"))


def stored_events(path: Path) -> list[StoredEvent]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [decode_stored(row["seq"], row["kind"], row["data"], row["commit"]) for row in rows]


def folded(path: Path) -> Execution:
    first, *rest = stored_events(path)
    assert isinstance(first.event, ExecutionCreated)
    execution = new_execution(f"exe_00{path.stem}", first.event)
    for stored in rest:
        execution = evolve(execution, stored.event)
        assert execution.seq == stored.seq
    return execution


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_stored_journal_gives_the_record_it_gave_then(path: Path) -> None:
    expected = json.loads(path.with_suffix(".record.json").read_text())
    shown = json.loads(json.dumps(record_view(folded(path), None)))
    # A later release may show more, never other than what it showed.
    assert {name: shown[name] for name in expected} == expected


def test_every_kind_of_event_is_in_a_journal() -> None:
    assert JOURNALS
    kinds = {KIND_OF[type(stored.event)] for path in JOURNALS for stored in stored_events(path)}
    assert kinds == set(KINDS)

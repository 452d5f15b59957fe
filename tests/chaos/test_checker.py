"""The judge itself: it must be able to say no."""

from dataclasses import replace

import pytest

from tests.support.checker import Entry, journal_problems, loss_and_repetition, view_problems

GOOD = [
    Entry(seq, kind, data)
    for seq, (kind, data) in enumerate(
        [
            ("execution.created", {}),
            ("execution.started", {}),
            ("step.started", {"step_id": "one", "attempt": 1}),
            ("chunk", {"step_id": "one", "text": "lost "}),
            ("step.retrying", {"step_id": "one", "attempt": 1}),
            ("step.started", {"step_id": "one", "attempt": 1}),
            ("chunk", {"step_id": "one", "text": "a "}),
            ("chunk", {"step_id": "one", "text": "b"}),
            ("step.completed", {"step_id": "one", "output": "a b"}),
            ("execution.completed", {"data": "a b"}),
        ],
        start=1,
    )
]
VIEW = [entry for entry in GOOD if entry.kind != "execution.created"]


def numbered(*entries: Entry) -> list[Entry]:
    return [replace(entry, seq=seq) for seq, entry in enumerate(entries, start=1)]


def test_a_good_journal_and_a_good_view_have_no_problem() -> None:
    assert journal_problems(GOOD) == []
    assert view_problems(VIEW, GOOD) == []


PLANTED = {
    "two terminal events": numbered(*GOOD, GOOD[-1]),
    "no terminal event": GOOD[:-1],
    "events after the end": numbered(*GOOD, GOOD[6]),
    "a step completed twice": numbered(*GOOD[:9], GOOD[8], GOOD[9]),
    "a finished step run again": numbered(*GOOD[:9], GOOD[5], *GOOD[8:]),
    "completed without a result": numbered(*GOOD[:8], GOOD[9]),
    "a lost chunk": numbered(*GOOD[:6], *GOOD[7:]),
    "a repeated chunk": numbered(*GOOD[:7], *GOOD[6:]),
    "a hole in the sequence": [*GOOD[:4], *GOOD[5:]],
    "an attempt that was skipped": [
        replace(entry, data={**entry.data, "attempt": 3}) if entry.seq == 6 else entry
        for entry in GOOD
    ],
    "nothing at all": [],
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str) -> None:
    assert journal_problems(PLANTED[name]) != []


def test_what_a_reader_lost_or_saw_twice_is_counted() -> None:
    lost = loss_and_repetition([*VIEW[:3], *VIEW[5:]], GOOD)
    assert (lost.expected, lost.lost, lost.repeated) == (9, 2, 0)
    repeated = loss_and_repetition([*VIEW[:3], *VIEW[1:]], GOOD)
    assert (repeated.lost, repeated.repeated) == (0, 2)
    assert view_problems([VIEW[1], VIEW[0], *VIEW[2:]], GOOD) == ["out of order"]
    assert view_problems([replace(VIEW[0], kind="chunk"), *VIEW[1:]], GOOD) != []

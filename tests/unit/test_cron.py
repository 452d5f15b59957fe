"""Clocks: which moments a cron text means where clocks change, and what is caught up on."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from zoneinfo import ZoneInfo

import pytest

from serve_app.adapters.cronsim_schedules import CronSchedules
from serve_app.core.cron import CATCH_UP_MAX, LATE_MS, due_times
from serve_app.core.errors import InvalidWorkflowError
from serve_app.core.triggers import CatchUp, CronTrigger, EventTrigger, started_by_clock
from tests.support.definitions import parsed

SCHEDULES = CronSchedules()
BERLIN = "Europe/Berlin"
STEPS = "[{id: a, echo: {}}]"
MINUTE_MS, DAY_MS = 60_000, 86_400_000
NOW_MS = 1_800_000_030_000  # half a minute past


def moments(cron: str, zone: str, after: str) -> Iterator[str]:
    after_ms = round(datetime.fromisoformat(after).timestamp() * 1000)
    while (next_ms := SCHEDULES.next_ms(cron, zone, after_ms)) is not None:
        assert next_ms > after_ms
        after_ms = next_ms
        yield datetime.fromtimestamp(next_ms / 1000, ZoneInfo(zone)).strftime("%d %H:%M%z")


@pytest.mark.parametrize(
    ("cron", "zone", "after", "expected"),
    [
        # 29 March 2026: there is no 02:00 to 03:00 in Berlin.
        ("30 2 * * *", BERLIN, "2026-03-28T12:00+01:00", ["29 03:00+0200", "30 02:30+0200"]),
        ("0 2-3 * * *", BERLIN, "2026-03-28T12:00+01:00", ["29 03:00+0200", "30 02:00+0200"]),
        ("*/30 * * * *", BERLIN, "2026-03-29T01:10+01:00", ["29 01:30+0100", "29 03:00+0200"]),
        ("15 * * * *", BERLIN, "2026-03-29T01:10+01:00", ["29 01:15+0100", "29 03:15+0200"]),
        # 25 October 2026: there are two of them.
        ("30 2 * * *", BERLIN, "2026-10-24T12:00+02:00", ["25 02:30+0200", "26 02:30+0100"]),
        ("30 2 * * *", BERLIN, "2026-10-25T02:10+01:00", ["26 02:30+0100", "27 02:30+0100"]),
        ("30 2 * * *", BERLIN, "2026-10-25T02:40+02:00", ["26 02:30+0100", "27 02:30+0100"]),
        (
            "*/30 * * * *",
            BERLIN,
            "2026-10-25T01:40+02:00",
            ["25 02:00+0200", "25 02:30+0200", "25 02:00+0100", "25 02:30+0100", "25 03:00+0100"],
        ),
        ("15 * * * *", BERLIN, "2026-10-25T02:20+02:00", ["25 02:15+0100", "25 03:15+0100"]),
        # Half an hour in Lord Howe; a whole day that Apia left out at the end of 2011.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00Z", ["04 02:30+1100"]),
        ("0 9 * * *", "Pacific/Apia", "2011-12-29T20:00Z", ["31 00:00+1400", "31 09:00+1400"]),
        ("0 9 * * 1-5", BERLIN, "2026-11-20T12:00+01:00", ["23 09:00+0100", "24 09:00+0100"]),
        ("0 0 L * *", "UTC", "2028-02-01T00:00Z", ["29 00:00+0000", "31 00:00+0000"]),
        ("0 0 29 2 *", "UTC", "2026-03-01T00:00Z", ["29 00:00+0000"]),
        ("0 0 13 * FRI", "UTC", "2026-11-12T00:00Z", ["13 00:00+0000", "20 00:00+0000"]),
    ],
)
def test_when_a_clock_is_due(cron: str, zone: str, after: str, expected: list[str]) -> None:
    assert list(islice(moments(cron, zone, after), len(expected))) == expected


@pytest.mark.parametrize(
    "cron",
    [
        *("", "*", "* * * *", "* * * * * *", "@daily", "99 * * * *", "* 24 * * *", "0 0 0 * *"),
        *("0 0 30 2 *", "0 0 31 2,4,6 *", "a * * * *", "*/0 * * * *", "-1 * * * *", "5-1 * * * *"),
        *("1,,2 * * * *", "٣ * * * *", "L/2 * * * *", "0 0 5L/2 * *", "0 0 * * 5L/2", "1- * * * *"),
        *("0 0 * * 1#6", "0 0 * * MON#", "0 0 * * L", "1e3 * * * *", "0x1 * * * *", "\n\n\n\n\n"),
        *("*" * 101, "1," * 40 + " * * * *", "/ / / / /", "# # # # #", "0 0 * * 8", "0 0 1 13 *"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_place(cron: str) -> None:
    with pytest.raises(InvalidWorkflowError) as refused:
        parsed(STEPS, triggers=[{"cron": cron}])
    assert [problem.loc for problem in refused.value.problems] == [("triggers", 0, "cron")]


@pytest.mark.parametrize(
    ("trigger", "loc"),
    [
        ({"cron": 5}, ("triggers", 0, "cron")),
        ({"cron": "0 9 * * *", "timezone": 1}, ("triggers", 0, "cron")),
        ({"cron": "0 9 * * *", "timezone": "Europe"}, ("triggers", 0, "timezone")),
        ({"cron": "0 9 * * *", "timezone": "../../etc/passwd"}, ("triggers", 0, "timezone")),
        ({"cron": "0 9 * * *", "timezone": ""}, ("triggers", 0, "timezone")),
        ({"cron": "0 9 * * *", "catchUp": "some"}, ("triggers", 0, "catchUp")),
        ({"cron": "0 9 * * *", "if": "true"}, ("triggers", 0, "if")),
        ({"cron": "0 9 * * *", "event": "a"}, ("triggers", 0)),
        ({}, ("triggers", 0)),
    ],
)
def test_a_wrong_clock_is_one_problem_with_its_place(
    trigger: object, loc: tuple[str | int, ...]
) -> None:
    with pytest.raises(InvalidWorkflowError) as refused:
        parsed(STEPS, triggers=[trigger])
    assert [problem.loc for problem in refused.value.problems] == [loc]


def test_a_clock_is_read() -> None:
    clocks = [{"cron": "0 9 * * 1-5", "timezone": BERLIN, "catchUp": "all"}, {"cron": "0 0 * * *"}]
    assert parsed(STEPS, triggers=clocks).triggers == (
        CronTrigger("0 9 * * 1-5", BERLIN, CatchUp.ALL),
        CronTrigger("0 0 * * *", "UTC", CatchUp.LATEST),
    )


class Counted:
    """Schedules that count how often they are asked."""

    def __init__(self) -> None:
        self.asked = 0

    def next_ms(self, cron: str, timezone: str, after_ms: int) -> int | None:
        self.asked += 1
        return SCHEDULES.next_ms(cron, timezone, after_ms)


@pytest.mark.parametrize(
    ("policy", "late_ms", "count"),
    [
        (CatchUp.LATEST, 20_000, 0),
        (CatchUp.LATEST, MINUTE_MS, 1),
        (CatchUp.LATEST, 10 * MINUTE_MS, 1),
        (CatchUp.LATEST, 1000 * DAY_MS, 1),
        (CatchUp.SKIP, 10 * MINUTE_MS, 1),  # the one of this minute is no missed one
        (CatchUp.SKIP, 1000 * DAY_MS, 1),
        (CatchUp.ALL, 10 * MINUTE_MS, 10),
        (CatchUp.ALL, CATCH_UP_MAX * MINUTE_MS, CATCH_UP_MAX),
        (CatchUp.ALL, (CATCH_UP_MAX + 1) * MINUTE_MS, CATCH_UP_MAX),
        (CatchUp.ALL, 1000 * DAY_MS, CATCH_UP_MAX),
    ],
)
def test_what_was_missed_is_caught_up_on_within_bounds(
    policy: CatchUp, late_ms: int, count: int
) -> None:
    counted, trigger = Counted(), CronTrigger("* * * * *", "UTC", policy)
    due, following = due_times([trigger], NOW_MS - late_ms, NOW_MS, counted.next_ms)
    newest = NOW_MS - 30_000
    assert list(due) == [newest - MINUTE_MS * ago for ago in reversed(range(count))]
    assert following == newest + MINUTE_MS
    assert counted.asked < 1000


def test_a_rare_clock_is_found_far_back_and_skipped_where_that_is_the_policy() -> None:
    after_ms = NOW_MS - 300 * DAY_MS
    latest = CronTrigger("0 0 1 1 *", "UTC")
    due, _ = due_times([latest, EventTrigger("n")], after_ms, NOW_MS, SCHEDULES.next_ms)
    assert [datetime.fromtimestamp(at / 1000, UTC).isoformat() for at in due] == [
        "2027-01-01T00:00:00+00:00"
    ]
    skip = CronTrigger("0 0 1 1 *", "UTC", CatchUp.SKIP)
    assert due_times([skip], after_ms, NOW_MS, SCHEDULES.next_ms)[0] == {}
    at_ms = next(iter(due))
    for late_ms, count in ((0, 1), (LATE_MS - 1, 1), (LATE_MS, 0)):
        found, _ = due_times([skip], after_ms, at_ms + late_ms, SCHEDULES.next_ms)
        assert len(found) == count


def test_clocks_that_are_due_together_are_one_time() -> None:
    noon, hourly = CronTrigger("0 12 * * *", "UTC"), CronTrigger("0 * * * *", "UTC")
    noon_ms = 1_800_014_400_000
    due, following = due_times([noon, hourly], noon_ms - 1, noon_ms, SCHEDULES.next_ms)
    assert due == {noon_ms: noon}
    assert following == noon_ms + 60 * MINUTE_MS


def test_nothing_is_due_while_the_clock_is_behind_what_was_dealt_with() -> None:
    after_ms = NOW_MS + 10 * MINUTE_MS
    every = CronTrigger("* * * * *", "UTC", CatchUp.ALL)
    due, following = due_times([every], after_ms, NOW_MS, SCHEDULES.next_ms)
    assert due == {}
    assert following is not None
    assert following > after_ms


def test_ids_follow_from_the_due_time() -> None:
    one = started_by_clock(16, "w", "flow", 5)
    assert one == started_by_clock(16, "w", "flow", 5)
    others = [("v", "flow", 5), ("w", "flow", 6), ("w", "wolf", 5)]
    assert one not in {started_by_clock(16, *other) for other in others}

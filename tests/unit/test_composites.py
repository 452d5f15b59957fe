"""`parallel`, `map`, `branch` and `loop`: what they give, what they abort, what they cost."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from serve_app.core.blocks import MAP_ITEMS_MAX
from serve_app.core.decisions import kept_for_retry, progress_percent
from serve_app.core.errors import StepFailedError
from serve_app.core.execution import (
    ExecutionStarted,
    MapOpened,
    Status,
    StepStarted,
    StepStatus,
)
from serve_app.core.inference import JsonValue
from serve_app.ingress.views import record_view
from serve_app.ports import StepCall
from tests.support.definitions import a_rig, driven, parsed
from tests.support.virtual_time import virtual_time
from tests.support.workflows import EXECUTION_ID, FIXED, T0, an_execution


async def its_settings(call: StepCall) -> JsonValue:
    await asyncio.sleep(0.01)
    return call.settings


async def failing(call: StepCall) -> JsonValue:
    raise StepFailedError("boom", False)


PARALLEL = """
- id: first
  echo: {n: 1}
- id: both
  parallel:
    branches:
      left:
        - {id: a, work: "{{ steps.first.output.n }}"}
        - {id: b, transform: "{{ steps.a.output + 1 }}"}
      right:
        - {id: c, work: {}}
- {id: last, transform: "{{ steps.both.output.left }}"}
"""


@virtual_time
async def test_branches_run_side_by_side_and_give_an_object() -> None:
    together = asyncio.Barrier(2)

    async def meet(call: StepCall) -> JsonValue:
        await together.wait()
        return call.settings

    rig = a_rig(PARALLEL, meet)
    ended = await driven(rig)
    assert (ended.status, ended.data) == (Status.COMPLETED, 2)
    assert ended.steps["both"].output == {"left": 2, "right": {}}
    assert {call.step_id for call in rig.calls} == {"both/left/a", "both/right/c"}
    assert rig.calls[0].idempotency_key == f"{EXECUTION_ID}/both/left/a/1"


MAP = """
- id: each
  map:
    over: "{{ input }}"
    concurrency: 3
    steps:
      - {id: fetch, work: {n: "{{ item }}", i: "{{ index }}"}}
      - {id: double, when: "item != 4", transform: "{{ steps.fetch.output.n * 2 + index }}"}
"""


@virtual_time
async def test_a_map_keeps_the_order_of_its_items_and_the_bound() -> None:
    running = Counter[str]()

    async def busy(call: StepCall) -> JsonValue:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        await asyncio.sleep(0.1 / (1 + call.settings["i"]))
        running["now"] -= 1
        return call.settings

    ended = await driven(a_rig(MAP, busy), [5, 4, 3, 2, 1])
    assert ended.data == [10, None, 8, 7, 6]
    assert running["most"] == 3
    assert ended.steps["each/1/double"].status is StepStatus.SKIPPED
    assert ended.steps["each"].items is None


@virtual_time
async def test_a_map_over_nothing_is_an_empty_list() -> None:
    assert (await driven(a_rig(MAP, its_settings), [])).data == []


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({}, "step each: over: the expression must give a list"),
        ([0] * (MAP_ITEMS_MAX + 1), f"a map takes at most {MAP_ITEMS_MAX}"),
    ],
)
def test_a_map_over_something_else_fails_in_words(value: JsonValue, error: str) -> None:
    @virtual_time
    async def run() -> None:
        ended = await driven(a_rig(MAP, its_settings), value)
        assert (ended.status, ended.error_code) == (Status.FAILED, "STEP_FAILED")
        assert error in (ended.error or "")

    run()


@virtual_time
async def test_a_failed_item_fails_the_map_and_aborts_its_siblings() -> None:
    aborted = []

    async def work(call: StepCall) -> JsonValue:
        if call.settings["n"] == 2:
            raise StepFailedError("boom", False)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            aborted.append(call.step_id)
            raise
        return None

    ended = await driven(a_rig(MAP, work), [1, 2, 3, 4])
    assert ended.error == "step each/1/fetch: boom"
    assert sorted(aborted) == ["each/0/fetch", "each/2/fetch"]
    assert ended.steps["each/0/fetch"].status is StepStatus.CANCELLED
    assert "each/3/fetch" not in ended.steps


@virtual_time
async def test_onerror_skip_gives_null_for_the_failed_item_and_uses_no_try_of_the_execution() -> (
    None
):
    async def work(call: StepCall) -> JsonValue:
        if call.settings["n"] == 2:
            raise StepFailedError("boom")
        return call.settings

    steps = MAP.replace("concurrency: 3", "concurrency: 3\n    onError: skip")
    ended = await driven(a_rig(steps, work), [1, 2, 3], retry=FIXED)
    assert (ended.data, ended.attempt) == ([2, None, 8], 1)
    assert ended.steps["each/1/fetch"].error == "boom"
    assert "each/1/double" not in ended.steps


@virtual_time
async def test_an_inner_step_is_retried_by_itself_and_then_by_the_execution() -> None:
    async def work(call: StepCall) -> JsonValue:
        if call.attempt < 4:
            raise StepFailedError("not yet")
        return call.attempt

    steps = """
    - id: p
      parallel:
        branches: {a: [{id: x, work: {}, retry: {attempts: 1, backoff: fixed, maxDelay: 10}}]}
    """
    rig = a_rig(steps, work)
    tries = 0
    while not (await rig.drive(retry=FIXED) if not tries else rig.state).is_terminal:
        tries += 1
        await asyncio.sleep(1)
        await (await rig.driver(f"w{tries}/{tries}")).drive()
    assert rig.state.data == {"a": 4}
    assert rig.state.attempt == 2


BRANCH = """
- id: way
  branch:
    cases:
      - when: "input > 10"
        steps: [{id: big, transform: "{{ 'big' + string(input) }}"}]
      - when: "input > 5"
        steps: [{id: middle, work: "middle"}]
    else: [{id: small, echo: {is: small}}]
"""


@pytest.mark.parametrize(("value", "data"), [(11, "big11"), (6, "middle"), (1, {"is": "small"})])
def test_a_branch_takes_the_first_case_that_holds(value: int, data: JsonValue) -> None:
    @virtual_time
    async def run() -> None:
        ended = await driven(a_rig(BRANCH, its_settings), value)
        assert ended.data == data
        assert len(ended.steps) == 2

    run()


@virtual_time
async def test_a_branch_without_a_case_that_holds_gives_null() -> None:
    steps = BRANCH[: BRANCH.index("    else")]
    ended = await driven(a_rig(steps, its_settings), 1)
    assert (ended.status, ended.data) == (Status.COMPLETED, None)


@virtual_time
async def test_a_case_that_is_no_condition_fails_the_branch() -> None:
    ended = await driven(a_rig(BRANCH, its_settings), "text")
    assert (ended.error or "").startswith("step way: case 0: when: ")


LOOP = """
- id: refine
  loop:
    while: "steps.draft.output == null || steps.draft.output < 30"
    maxRounds: 4
    steps:
      - {id: draft, work: "{{ steps.draft.output == null ? input : steps.draft.output * 2 }}"}
      - {id: note, transform: "{{ steps.draft.output }}"}
"""


@pytest.mark.parametrize(
    ("start", "data", "rounds"), [(10, 40, 3), (40, 40, 1), (1, 8, 4), (16, 32, 2)]
)
def test_a_loop_sees_its_last_round_and_ends_by_its_condition_or_its_bound(
    start: int, data: int, rounds: int
) -> None:
    @virtual_time
    async def run() -> None:
        rig = a_rig(LOOP, its_settings)
        ended = await driven(rig, start)
        assert (ended.data, len(rig.calls)) == (data, rounds)
        assert f"refine/{rounds - 1}/note" in ended.steps

    run()


@virtual_time
async def test_a_loop_without_a_round_gives_null() -> None:
    steps = LOOP.replace('"steps.draft.output == null || steps.draft.output < 30"', '"false"')
    assert (await driven(a_rig(steps, its_settings), 1)).data is None


DEEP = """
- id: outer
  map:
    over: [1, 2]
    steps:
      - id: way
        branch:
          cases:
            - when: "item == 1"
              steps:
                - id: inner
                  map:
                    over: "{{ [item * 10, item * 20] }}"
                    steps:
                      - {id: leaf, work: "{{ item + index }}"}
          else: [{id: other, work: "{{ 'other' + string(item) }}"}]
"""


@virtual_time
async def test_composites_nest_and_the_innermost_item_counts() -> None:
    ended = await driven(a_rig(DEEP, its_settings))
    assert ended.data == [[10, 21], "other2"]
    assert ended.steps["outer/0/way/0/inner/1/leaf"].output == 21
    shown = record_view(ended, parsed(DEEP))["steps"]
    assert [(step["id"], step["type"]) for step in shown] == [
        ("outer", "map"),
        ("outer/0/way", "branch"),
        ("outer/0/way/0/inner", "map"),
        ("outer/0/way/0/inner/0/leaf", "work"),
        ("outer/0/way/0/inner/1/leaf", "work"),
        ("outer/1/way", "branch"),
        ("outer/1/way/else/other", "work"),
    ]


@virtual_time
async def test_a_failure_deep_down_fails_all_around_it_by_its_own_name() -> None:
    ended = await driven(a_rig(DEEP, its_settings, leaf=failing))
    assert ended.error == "step outer/0/way/0/inner/0/leaf: boom"
    for path in ("outer", "outer/0/way", "outer/0/way/0/inner"):
        assert ended.steps[path].status is StepStatus.FAILED
    assert not ended.live_steps


@virtual_time
async def test_a_cancel_aborts_every_inner_step() -> None:
    async def forever(call: StepCall) -> JsonValue:
        if len(rig.calls) == 3:
            rig.cancel(driver)
        await asyncio.Event().wait()
        return None

    rig = a_rig(DEEP, forever)
    driver = await rig.driver()
    await driver.drive()
    assert rig.state.status is Status.CANCELLED
    assert {step.status for step in rig.state.steps.values()} == {StepStatus.CANCELLED}


@virtual_time
async def test_a_new_owner_repeats_inner_attempts_and_no_finished_one() -> None:
    async def half(call: StepCall) -> JsonValue:
        if call.settings["n"] > 2 and len(rig.calls) < 6:
            await asyncio.Event().wait()
        return call.settings

    rig = a_rig(MAP, half)
    driver = await rig.driver(input=[1, 2, 3, 4, 5])
    task = asyncio.ensure_future(driver.drive())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait((task,))
    await (await rig.driver("w2/2")).drive()
    assert rig.state.data == [2, 5, 8, None, 14]
    counts = Counter(call.step_id for call in rig.calls)
    assert [counts[f"each/{index}/fetch"] for index in range(5)] == [1, 1, 2, 2, 2]
    assert {call.attempt for call in rig.calls} == {1}


@virtual_time
async def test_a_retry_from_a_step_keeps_composites_as_a_whole() -> None:
    ended = await driven(a_rig(PARALLEL, its_settings))
    assert kept_for_retry(ended, parsed(PARALLEL), "last") == {
        "first": {"n": 1},
        "both": ended.steps["both"].output,
    }


@virtual_time
async def test_progress_counts_the_items_that_are_done() -> None:
    async def two(call: StepCall) -> JsonValue:
        if call.settings["n"] > 2:
            await asyncio.Event().wait()
        return call.settings

    rig = a_rig(MAP, two)
    driver = await rig.driver(input=[1, 2, 3, 4])
    task = asyncio.ensure_future(driver.drive())
    await asyncio.sleep(1)
    assert progress_percent(rig.state, rig.workflow) == 50
    task.cancel()
    await asyncio.wait((task,))


@virtual_time
async def test_a_large_map_is_cut_into_commits_and_costs_what_it_should() -> None:
    steps = """
    - id: each
      map: {over: "{{ input }}", steps: [{id: one, transform: "{{ item + 1 }}"}]}
    """
    rig = a_rig(steps)
    ended = await driven(rig, list(range(2000)))
    assert ended.data == list(range(1, 2001))
    assert 8 < len(rig.commits()) < 20


@pytest.mark.parametrize("limit", ["EVENTS_MAX", "STARTED_MAX"])
def test_an_execution_that_outgrows_a_limit_ends_by_its_name(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"serve_app.core.due.{limit}", 50)

    @virtual_time
    async def run() -> None:
        ended = await driven(a_rig(MAP, its_settings), list(range(100)))
        assert ended.status is Status.FAILED
        assert " 50 " in (ended.error or "")

    run()


def test_a_state_read_back_knows_what_is_live() -> None:
    running = an_execution(
        ExecutionStarted(T0),
        StepStarted(T0, "each", 1),
        MapOpened(T0, "each", (1,)),
        StepStarted(T0, "each/0/fetch", 1),
    )
    assert list(replace(running, live=None).live_steps) == ["each", "each/0/fetch"]

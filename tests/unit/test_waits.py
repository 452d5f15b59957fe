"""Steps that wait: who answers them, when they end by themselves, and what holds no worker."""

import asyncio
from dataclasses import replace

import pytest

from serve_app.core.decisions import receive
from serve_app.core.errors import AlreadyTerminalError, TooManySignalsError
from serve_app.core.execution import (
    Execution,
    ExecutionCompleted,
    ExecutionStarted,
    SignalReceived,
    SignalTaken,
    Status,
    StepStatus,
)
from serve_app.core.inference import JsonValue
from serve_app.core.waits import SIGNALS_MAX
from serve_app.ingress.views import record_view
from serve_app.ports import StepCall
from tests.support.definitions import a_rig, parsed
from tests.support.rig import Rig, now_ms
from tests.support.virtual_time import EPOCH_MS, virtual_time
from tests.support.workflows import T0, an_execution

APPROVAL = """
- {id: ask, approval: {message: "Ship {{ input }}?", timeout: 1h}}
"""
EVENT = """
- {id: paid, wait_for_event: {event: "shop/paid", if: "event.data.order == input", timeout: 1h}}
- {id: after, transform: "{{ steps.paid.output == null ? 'none' : steps.paid.output.data }}"}
"""


async def parked(rig: Rig, value: JsonValue = 7, **created: object) -> Execution:
    state = await rig.drive(input=value, **created)
    assert state.status is Status.WAITING
    return state


async def woken(rig: Rig) -> Execution:
    """Somebody else takes it up."""
    await (await rig.driver("w9/9")).drive()
    return rig.state


@pytest.mark.parametrize(
    ("text", "slept_ms"),
    [
        ("2s", 2000),
        ("1500", 1500),
        ('"{{ input }}ms"', 70),
        ("{until: 1800000005000}", 5000),
        ('{until: "2027-01-15T08:00:03Z"}', 3000),
        ('{until: "2027-01-15T09:00:03.500+01:00"}', 3500),
        ('{until: "2020-01-01T00:00:00Z"}', 0),
    ],
)
def test_a_sleep_parks_until_its_time_and_gives_null(text: str, slept_ms: int) -> None:
    @virtual_time
    async def run() -> None:
        ended = await a_rig(f"- {{id: nap, sleep: {text}}}").drive_to_the_end(input=70)
        assert (ended.status, ended.data) == (Status.COMPLETED, None)
        assert now_ms() - EPOCH_MS == pytest.approx(slept_ms, abs=5)

    run()


@pytest.mark.parametrize("text", ['"{{ input }}"', '{until: "{{ input }}"}'])
@pytest.mark.parametrize("value", ["soon", -5, None, True, "2027-01-15T08:00:03", "9999d"])
def test_a_sleep_that_is_no_time_fails_in_words(text: str, value: JsonValue) -> None:
    @virtual_time
    async def run() -> None:
        ended = await a_rig(f"- {{id: nap, sleep: {text}}}").drive_to_the_end(input=value)
        assert ended.status is Status.FAILED
        assert "step nap: " in (ended.error or "")

    run()


@pytest.mark.parametrize(
    ("data", "approved"),
    [
        (True, True),
        ({"approved": True, "by": "Ada"}, True),
        (False, False),
        ({"approved": "yes"}, False),
        ({"approved": 1}, False),
        ("approved", False),
        (None, False),
    ],
)
def test_an_approval_is_given_by_a_plain_yes_alone(data: JsonValue, approved: bool) -> None:
    @virtual_time
    async def run() -> None:
        rig = a_rig(APPROVAL)
        await parked(rig)
        rig.signal("ask", data)
        assert (await woken(rig)).data == {"approved": approved, "data": data}

    run()


@virtual_time
async def test_an_approval_nobody_gives_is_none() -> None:
    rig = a_rig(APPROVAL)
    assert (await rig.drive_to_the_end(input=7)).data == {"approved": False, "data": None}
    assert now_ms() - EPOCH_MS == pytest.approx(3_600_000, abs=5)


@virtual_time
async def test_a_waiting_step_shows_what_it_waits_for() -> None:
    rig = a_rig(APPROVAL)
    (shown,) = record_view(await parked(rig), parsed(APPROVAL))["steps"]
    assert (shown["status"], shown["type"]) == ("waiting", "approval")
    until = "2027-01-15T09:00:00.000Z"
    assert shown["waiting"] == {"until": until, "event": None, "message": "Ship 7?"}


@virtual_time
async def test_an_event_is_taken_by_name_and_condition() -> None:
    rig = a_rig(EVENT)
    await parked(rig)
    rig.signal("shop/paid", {"order": 6})
    assert (await woken(rig)).status is Status.WAITING
    rig.signal("shop/other", {"order": 7})
    rig.signal("shop/paid", {"order": 7, "n": 1})
    rig.signal("shop/paid", {"order": 7, "n": 2})
    ended = await woken(rig)
    assert ended.data == {"order": 7, "n": 1}
    assert ended.steps["paid"].output == {"name": "shop/paid", "data": {"order": 7, "n": 1}}
    assert [signal.data for signal in ended.signals] == [{"order": 6}, {"order": 7}, {"order": 7, "n": 2}]  # fmt: skip # noqa: E501


@virtual_time
async def test_a_signal_of_the_steps_name_answers_whatever_the_condition_says() -> None:
    rig = a_rig(EVENT)
    await parked(rig)
    rig.signal("paid", "by hand")
    assert (await woken(rig)).data == "by hand"


@virtual_time
async def test_an_event_that_never_comes_is_null() -> None:
    assert (await a_rig(EVENT).drive_to_the_end(input=7)).data == "none"


@virtual_time
async def test_a_condition_without_a_value_fails_the_step() -> None:
    rig = a_rig(EVENT)
    await parked(rig)
    rig.signal("shop/paid", "no order in it")
    assert "step paid: if: " in ((await woken(rig)).error or "")


@virtual_time
async def test_a_signal_before_its_step_is_kept_for_it() -> None:
    rig = a_rig("- {id: nap, sleep: 1s}\n" + APPROVAL.strip())
    await parked(rig)
    rig.signal("ask", True)
    ended = await rig.drive_to_the_end()
    assert ended.data == {"approved": True, "data": True}
    assert now_ms() - EPOCH_MS == pytest.approx(1000, abs=5)
    assert ended.signals == ()


@virtual_time
async def test_a_signal_while_another_step_works_ends_the_wait_at_once() -> None:
    gate = asyncio.Event()

    async def work(call: StepCall) -> JsonValue:
        await gate.wait()
        return "worked"

    rig = a_rig(APPROVAL + "- {id: busy, work: {}, needs: []}", work)
    driver = await rig.driver(input=7)
    task = asyncio.ensure_future(driver.drive())
    await asyncio.sleep(1)
    rig.signal("ask", True, driver)
    await asyncio.sleep(1)
    assert rig.state.steps["ask"].status is StepStatus.COMPLETED
    gate.set()
    await task
    assert rig.state.data == "worked"


@virtual_time
async def test_each_item_of_a_map_waits_for_its_own() -> None:
    steps = """
    - id: each
      map: {over: [1, 2], steps: [{id: ask, approval: {message: "?", timeout: 1h}}]}
    """
    rig = a_rig(steps)
    await parked(rig)
    rig.signal("each/1/ask", True)
    assert (await woken(rig)).steps["each/1/ask"].output == {"approved": True, "data": True}
    rig.signal("ask", {"approved": False})
    ended = await woken(rig)
    assert [item["approved"] for item in ended.data] == [False, True]


@virtual_time
async def test_a_cancel_ends_a_wait() -> None:
    rig = a_rig(APPROVAL)
    await parked(rig)
    rig.cancel()
    ended = await woken(rig)
    assert (ended.status, ended.steps["ask"].status) == (Status.CANCELLED, StepStatus.CANCELLED)


@virtual_time
async def test_the_deadline_ends_a_wait() -> None:
    ended = await a_rig(APPROVAL).drive_to_the_end(input=7, timeout_ms=5_000)
    assert (ended.status, ended.error_code) == (Status.FAILED, "TIMEOUT")
    assert now_ms() - EPOCH_MS == pytest.approx(5_000, abs=5)
    assert not ended.live_steps


@virtual_time
async def test_a_failure_beside_it_ends_a_wait_in_the_same_composite() -> None:
    async def failing(call: StepCall) -> JsonValue:
        raise ValueError

    steps = f"""
    - id: both
      parallel:
        branches:
          left: [{APPROVAL.strip()[2:]}]
          right: [{{id: x, work: {{}}}}]
    """
    ended = await a_rig(steps, failing).drive(input=7)
    assert ended.status is Status.FAILED
    assert ended.steps["both/left/ask"].status is StepStatus.CANCELLED


@virtual_time
async def test_a_new_owner_goes_on_waiting() -> None:
    async def forever(call: StepCall) -> JsonValue:
        await asyncio.Event().wait()

    rig = a_rig(APPROVAL + "- {id: busy, work: {}, needs: []}", forever)
    task = asyncio.ensure_future((await rig.driver(input=7)).drive())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait((task,))
    task = asyncio.ensure_future((await rig.driver("w2/2")).drive())
    await asyncio.sleep(1)
    waiting = rig.state.steps["ask"]
    assert (waiting.status, waiting.losses, waiting.attempt) == (StepStatus.WAITING, 0, 1)
    assert waiting.wait is not None
    assert waiting.wait.until_ms == EPOCH_MS + 3_600_000
    task.cancel()
    await asyncio.wait((task,))


def test_a_signal_to_what_has_ended_is_refused() -> None:
    ended = an_execution(ExecutionStarted(T0), ExecutionCompleted(T0, None))
    with pytest.raises(AlreadyTerminalError):
        receive(ended, "ask", True, T0)


@pytest.mark.parametrize("count", [SIGNALS_MAX - 1, SIGNALS_MAX])
def test_so_many_signals_are_kept(count: int) -> None:
    execution = an_execution(*(SignalReceived(T0, "x", n) for n in range(count)))
    if count < SIGNALS_MAX:
        assert receive(execution, "x", 1, T0) == (SignalReceived(T0, "x", 1),)
        return
    with pytest.raises(TooManySignalsError, match=str(SIGNALS_MAX)):
        receive(execution, "x", 1, T0)


def test_a_taken_signal_is_gone_and_the_others_keep_their_order() -> None:
    execution = an_execution(
        ExecutionStarted(T0),
        *(SignalReceived(T0, "x", n) for n in range(3)),
        SignalTaken(T0, "s", 4),
    )
    assert [signal.data for signal in execution.signals] == [0, 2]
    assert replace(execution, live=None).signals == execution.signals

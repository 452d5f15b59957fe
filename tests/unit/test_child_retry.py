"""A child that fails: the step's own tries, the execution's, and what is tried no more."""

from serve_app.core.children import child_id, wait_for
from serve_app.core.execution import (
    Event,
    SignalReceived,
    Status,
    StepFailed,
    StepRetrying,
    StepStatus,
)
from serve_app.core.inference import JsonValue
from serve_app.core.journal import Outgoing
from serve_app.core.retry import RetryPolicy
from serve_app.ports import StepCall
from tests.support.definitions import EXPRESSIONS, parsed
from tests.support.rig import Rig, now_ms
from tests.support.virtual_time import virtual_time
from tests.support.workflows import EXECUTION_ID

CHILD = "[{id: child, work: {}, retry: {attempts: 1, backoff: fixed}}]"
IN_A_MAP = f"""
- id: each
  map: {{over: "{{{{ input }}}}", onError: skip, steps: {CHILD}}}
"""


def child_of(attempt: int, path: str = "child") -> str:
    return child_id(1, EXECUTION_ID, path, attempt)


async def hand_over(call: StepCall) -> JsonValue:
    """As the step `workflow` does."""
    new_id = child_of(call.attempt, call.step_id)
    call.hand_over(wait_for(new_id, "other", now_ms() + 10**9), Outgoing(new_id, 0, "log", b""))
    return None


async def driven(rig: Rig, *outcomes: tuple[str, JsonValue], **created: object) -> None:
    """Drive until it ends; whenever it is parked for a child, the next outcome is that child's."""
    await rig.drive(**created)
    left, workers = list(outcomes), 1
    while not rig.state.is_terminal:
        waits = [rig.state.steps[path].wait for path in rig.state.live_steps]
        children = [wait.event for wait in waits if wait is not None]
        if children and children[0] is not None:
            status, value = left.pop(0)
            member = "data" if status == "completed" else "error"
            ended: Event = SignalReceived(now_ms(), children[0], {"status": status, member: value})
            rig.store.append(EXECUTION_ID, ended)
        workers += 1
        await (await rig.driver(f"w{workers}/{workers}")).drive()
    assert not left


def a_rig(steps: str = CHILD) -> Rig:
    return Rig(parsed(steps), {"child": hand_over}, expressions=EXPRESSIONS)


def retries(rig: Rig) -> list[StepRetrying]:
    return [event for event in rig.events if isinstance(event, StepRetrying)]


@virtual_time
async def test_the_next_try_is_another_child() -> None:
    rig = a_rig()
    await driven(rig, ("failed", "broke"), ("completed", 7))
    assert (rig.state.status, rig.state.data) == (Status.COMPLETED, 7)
    assert [message.message_id for message in rig.store.outbox] == [child_of(1), child_of(2)]
    assert rig.state.steps["child"].attempt == 2
    (retrying,) = retries(rig)
    assert retrying.error == f"other ({child_of(1)}): broke"
    assert retrying.wake_at_ms - retrying.at_ms == 1000


@virtual_time
async def test_its_last_failure_is_the_steps() -> None:
    rig = a_rig()
    await driven(rig, ("failed", "broke"), ("failed", "broke again"))
    assert rig.state.error == f"step child: other ({child_of(2)}): broke again"


@virtual_time
async def test_a_child_that_somebody_cancelled_is_not_replaced() -> None:
    rig = a_rig()
    await driven(rig, ("cancelled", "not wanted"))
    assert (rig.state.status, retries(rig)) == (Status.FAILED, [])


@virtual_time
async def test_the_executions_own_tries_follow_the_steps() -> None:
    rig = a_rig()
    await driven(rig, *[("failed", "broke")] * 3, ("completed", 7), retry=RetryPolicy(attempts=1))
    assert (rig.state.data, rig.state.attempt) == (7, 2)
    assert [event.attempt for event in retries(rig)] == [2, 3, 4]


@virtual_time
async def test_in_a_map_that_skips_only_the_steps_own_count() -> None:
    rig = a_rig(IN_A_MAP)
    await driven(rig, *[("failed", "broke")] * 2, retry=RetryPolicy(attempts=5), input=[1])
    assert (rig.state.data, rig.state.attempt) == ([None], 1)


@virtual_time
async def test_a_cancel_between_two_tries_starts_no_other() -> None:
    rig = a_rig()
    await rig.drive()
    outcome = {"status": "failed", "error": "broke"}
    rig.store.append(EXECUTION_ID, SignalReceived(now_ms(), child_of(1), outcome))
    await (await rig.driver("w2/2")).drive()
    assert rig.state.steps["child"].status is StepStatus.RETRYING
    rig.cancel()
    await (await rig.driver("w3/3")).drive()
    assert rig.state.status is Status.CANCELLED
    assert len(rig.store.outbox) == 1


@virtual_time
async def test_the_end_of_a_child_that_was_given_up_answers_no_other() -> None:
    rig = a_rig()
    await rig.drive()
    for _ in range(2):
        outcome = {"status": "failed", "error": "broke"}
        rig.store.append(EXECUTION_ID, SignalReceived(now_ms(), child_of(1), outcome))
    await (await rig.driver("w2/2")).drive()
    assert not any(isinstance(event, StepFailed) for event in rig.events)
    assert len(retries(rig)) == 1

"""What a lost worker leaves of an answer, and how the next one goes on with it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.decisions import RESUMES_MAX
from serve_app.core.emitted import Emitted, emitted_by_steps
from serve_app.core.errors import ConnectionFailedError, StoreUnavailableError
from serve_app.core.execution import (
    ChunkEmitted,
    Event,
    ExecutionStarted,
    Status,
    StepCompleted,
    StepResumed,
    StepRetrying,
    StepStarted,
)
from serve_app.core.inference import JsonValue, Resumed, Usage
from serve_app.ports import StepCall
from serve_app.services import lost_runs
from tests.support.memory_store import MemoryStore
from tests.support.rig import Rig
from tests.support.virtual_time import virtual_time
from tests.support.workflows import EXECUTION_ID, T0, a_step, a_workflow

ANSWER = tuple(range(10))
STEPS = ("a", "b")


def letters(ids: tuple[int, ...]) -> str:
    return "".join(chr(ord("a") + token) for token in ids)


events = st.one_of(
    st.builds(lambda step: StepStarted(T0, step, 1), st.sampled_from(STEPS)),
    st.builds(lambda step: StepRetrying(T0, step, 1, 1, T0, "e"), st.sampled_from(STEPS)),
    st.builds(lambda step: StepResumed(T0, step), st.sampled_from(STEPS)),
    st.builds(
        lambda step, ids: ChunkEmitted(T0, step, letters(ids), ids),
        st.sampled_from(STEPS),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ),
)


@given(st.lists(events, max_size=30))
def test_an_attempt_has_emitted_what_stands_behind_its_start(journal: list[Event]) -> None:
    found = emitted_by_steps(journal)
    for step in STEPS:
        own = [event for event in journal if getattr(event, "step_id", None) == step]
        cut = max(
            (i for i, e in enumerate(own) if isinstance(e, (StepStarted, StepRetrying))), default=-1
        )
        ids = [
            token
            for event in own[cut + 1 :]
            if isinstance(event, ChunkEmitted)
            for token in event.token_ids
        ]
        expected = Emitted(letters(tuple(ids)), tuple(ids))
        assert found.get(step, Emitted()) == expected


async def speak(call: StepCall) -> JsonValue:
    """Say the whole answer, a token a second, from where a lost run stopped."""
    known = call.emitted.token_ids
    assert known == ANSWER[: len(known)]
    assert call.emitted.text == letters(known)
    if known:
        call.report_resumed(Resumed.EXACT)
    call.report_usage(Usage(3, len(ANSWER)))
    for token in ANSWER[len(known) : -1]:
        call.emit(letters((token,)), (token,))
        await asyncio.sleep(1)
    call.emit(letters(ANSWER[-1:]), ANSWER[-1:])
    return letters(ANSWER)


def a_rig(run: Callable[..., object] = speak) -> Rig:
    return Rig(a_workflow(a_step("s")), {"s": run}, can_resume=True)


async def lose_owner(rig: Rig, token: str, after_s: float) -> None:
    driving = asyncio.create_task((await rig.driver(token)).drive())
    await asyncio.sleep(after_s)
    driving.cancel()
    await asyncio.wait((driving,))


@pytest.mark.parametrize("after_s", [0.5, 3.5, 7.5])
@virtual_time
async def test_a_new_owner_goes_on_behind_the_tokens_of_the_journal(after_s: float) -> None:
    rig = a_rig()
    await lose_owner(rig, "w1/1", after_s)
    await lose_owner(rig, "w2/2", 0.5)
    await (await rig.driver("w3/3")).drive()
    assert (rig.state.status, rig.state.data) == (Status.COMPLETED, letters(ANSWER))
    tokens = [token for e in rig.events if isinstance(e, ChunkEmitted) for token in e.token_ids]
    assert tuple(tokens) == ANSWER
    assert rig.text() == letters(ANSWER)
    assert StepRetrying not in rig.kinds()
    assert rig.kinds().count(StepStarted) == 1
    step = rig.state.steps["s"]
    assert (step.attempt, step.losses, step.resumed) == (1, 2, Resumed.EXACT)
    assert rig.state.wasted_tokens == 0


@virtual_time
async def test_an_answer_is_never_whole_in_the_journal_without_its_result() -> None:
    rig = a_rig()
    await rig.driver()
    await (await rig.driver("w2/2")).drive()
    journal = rig.store.journals[EXECUTION_ID]
    [last] = [s.commit_id for s in journal if isinstance(s.event, StepCompleted)]
    assert [s.commit_id for s in journal if isinstance(s.event, ChunkEmitted)][-1] == last


@virtual_time
async def test_what_had_said_nothing_yet_starts_again() -> None:
    async def silent_at_first(call: StepCall) -> JsonValue:
        if len(rig.calls) == 1:
            await asyncio.Event().wait()
        return await speak(call)

    rig = a_rig(silent_at_first)
    await lose_owner(rig, "w1/1", 1)
    await (await rig.driver("w2/2")).drive()
    assert StepResumed not in rig.kinds()
    assert rig.state.data == letters(ANSWER)


@virtual_time
async def test_after_a_retry_of_its_own_an_attempt_starts_from_nothing() -> None:
    async def lose_replica(call: StepCall) -> JsonValue:
        if len(rig.calls) == 2:
            call.emit(letters(ANSWER[3:4]), ANSWER[3:4])
            raise ConnectionFailedError("its replica was lost")
        return await speak(call)

    rig = a_rig(lose_replica)
    await lose_owner(rig, "w1/1", 2.5)
    await rig.drive_to_the_end()
    assert [len(call.emitted.token_ids) for call in rig.calls] == [0, 3, 0]
    assert rig.state.data == letters(ANSWER)


@virtual_time
async def test_an_answer_that_loses_its_worker_each_time_begins_anew_at_last() -> None:
    async def deadly(call: StepCall) -> JsonValue:
        call.emit("x", (1,))
        await asyncio.Event().wait()
        return None

    rig = a_rig(deadly)
    for number in range(RESUMES_MAX + 2):
        await lose_owner(rig, f"w/{number}", 0.5)
    assert rig.kinds().count(StepResumed) == RESUMES_MAX
    assert rig.kinds().count(StepRetrying) == 1
    assert rig.state.steps["s"].losses == RESUMES_MAX + 1


@virtual_time
async def test_a_journal_with_a_hole_is_not_gone_on_with() -> None:
    rig = a_rig()
    await lose_owner(rig, "w1/1", 3.5)
    journal = rig.store.journals[EXECUTION_ID]
    [at] = [i for i, s in enumerate(journal) if isinstance(s.event, ChunkEmitted)][1:2]

    class Holed(MemoryStore):
        async def read(self, execution_id: str, after: int, limit: int) -> object:
            found = await super().read(execution_id, after, limit)
            return tuple(one for one in found if one.seq != journal[at].seq)

    rig.store.__class__ = Holed
    await (await rig.driver("w2/2")).drive()
    assert rig.kinds().count(StepRetrying) == 1
    assert rig.state.data == letters(ANSWER)


@virtual_time
async def test_a_long_journal_is_read_by_pages_and_a_store_that_is_away_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lost_runs, "PAGE", 2)
    rig = a_rig()
    await lose_owner(rig, "w1/1", 6.5)
    rig.store.is_down = StoreUnavailableError("away")
    driving = asyncio.create_task((await rig.driver("w2/2")).drive())
    await asyncio.sleep(2)
    assert len(rig.calls) == 1
    rig.store.is_down = None
    await driving
    assert rig.state.data == rig.text() == letters(ANSWER)
    assert len(rig.calls[1].emitted.token_ids) == 7


def test_a_journal_without_tokens_leaves_nothing_to_go_on_from() -> None:
    started = (ExecutionStarted(T0), StepStarted(T0, "s", 1))
    assert emitted_by_steps((*started, ChunkEmitted(T0, "s", "text of no token"))) == {}
    begun = ChunkEmitted(T0, "s", "t", (1,))
    assert emitted_by_steps((*started, begun, replace(begun, text="u"))) == {
        "s": Emitted("tu", (1, 1))
    }

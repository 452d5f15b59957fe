"""What leaves with the commit that ends an execution."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from serve_app.core.errors import StoreUnavailableError
from serve_app.core.execution import CancelRequested, Execution, Status
from serve_app.core.journal import Commit, Outgoing
from serve_app.ports import StepType
from serve_app.services.planner import OnEnd, Runtime
from serve_app.services.runner import Driver
from tests.support.memory_store import MemoryStore
from tests.support.virtual_time import VirtualClock, virtual_time
from tests.support.workflows import (
    CREATED,
    EXECUTION_ID,
    ToyEntropy,
    ToyExpressions,
    a_chain,
    a_step,
    a_workflow,
)


async def a_driver(store: MemoryStore, on_end: OnEnd, rung: list[int]) -> Driver:
    clock = VirtualClock()
    await store.create(EXECUTION_ID, replace(CREATED, at_ms=clock.now_ms()), "create", "")
    types = {"pure": StepType(check=lambda settings: (), compute=lambda call: call.settings)}
    runtime = Runtime(store, types, ToyExpressions(), clock, ToyEntropy(), on_end)  # type: ignore[arg-type]
    workflow = a_workflow(*a_chain(*(a_step(name, type="pure") for name in "ab")))
    owned = store.own(EXECUTION_ID, "w1/1")
    return Driver(owned, workflow, runtime, lambda: rung.append(len(store.outbox)))


def message(execution: Execution) -> Outgoing:
    return Outgoing(f"end.{execution.id}", 0, "ends", execution.status.encode())


@virtual_time
async def test_the_end_s_messages_are_in_its_commit_and_rung_after_it() -> None:
    store, rung = MemoryStore(), list[int]()

    async def on_end(execution: Execution) -> Sequence[Outgoing]:
        assert execution.is_terminal
        assert store.outbox == []
        return [message(execution)]

    await (await a_driver(store, on_end, rung)).drive()
    assert [one.body for one in store.outbox] == [b"completed"]
    assert rung == [1]


@virtual_time
async def test_an_end_waits_for_its_messages_while_the_store_is_away() -> None:
    store, asked = MemoryStore(), 0

    async def on_end(execution: Execution) -> Sequence[Outgoing]:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise StoreUnavailableError("gone")
        return [message(execution)]

    await (await a_driver(store, on_end, [])).drive()
    assert asked == 3
    assert len(store.outbox) == 1


@virtual_time
async def test_a_cancel_that_comes_first_changes_what_is_told() -> None:
    store = MemoryStore()

    async def on_end(execution: Execution) -> Sequence[Outgoing]:
        return [message(execution)]

    async def cancel(commit: Commit) -> None:
        if store.states[EXECUTION_ID].status is Status.PENDING:
            store.append(EXECUTION_ID, CancelRequested(1, "enough"))

    store.before.append(cancel)
    await (await a_driver(store, on_end, [])).drive()
    assert [one.body for one in store.outbox] == [b"cancelled"]


@virtual_time
async def test_a_fault_in_telling_stops_the_driver_and_ends_nothing() -> None:
    store = MemoryStore()

    async def on_end(execution: Execution) -> Sequence[Outgoing]:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await (await a_driver(store, on_end, [])).drive()
    assert not store.states[EXECUTION_ID].is_terminal

"""Workspaces take turns at workers: a line of thousands is no other workspace's wait."""

from collections import Counter

import pytest

from serve_app.core.errors import OverloadedError
from serve_app.core.execution import CancelRequested, ExecutionCreated, evolve
from serve_app.core.journal import Commit, Committed, execution_id
from tests.integration.conftest import StoreBench, open_store

NOW_MS = 1_900_000_000_000
KEYS = "ip:{0}:"


async def queue(bench: StoreBench, workspace: str, count: int, **created: int) -> list[str]:
    """Accept executions in partition 0, where no worker is; their ids."""
    known = len(await bench.keys(f"{KEYS}s:*"))
    ids = [execution_id(0, f"{workspace}{known + number}") for number in range(count)]
    for an_id in ids:
        accepted = ExecutionCreated(NOW_MS, workspace, "wf", 1, {}, **created)
        await bench.store.create(an_id, accepted, f"create/{an_id}", "")
    return ids


async def claimed(bench: StoreBench, count: int, worker: str = "w1") -> list[str]:
    """The workspaces of the next claimed, in order."""
    return [one.execution.created.workspace for one in await bench.store.claim(0, worker, count)]


async def depth(bench: StoreBench) -> int:
    return int(await bench.client.get(f"{KEYS}depth") or 0)


async def test_one_behind_many_is_next(bench: StoreBench) -> None:
    await queue(bench, "heavy", 200)
    await queue(bench, "light", 1)
    assert "light" in await claimed(bench, 2)


async def test_each_line_gets_as_many(bench: StoreBench) -> None:
    for workspace, count in (("a", 60), ("b", 20), ("c", 20)):
        await queue(bench, workspace, count)
    assert Counter(await claimed(bench, 60)) == {"a": 20, "b": 20, "c": 20}
    assert Counter(await claimed(bench, 60)) == {"a": 40}


async def test_who_comes_one_at_a_time_gets_no_more_than_a_turn(bench: StoreBench) -> None:
    await queue(bench, "heavy", 50)
    order = []
    for _ in range(10):
        await queue(bench, "light", 1)
        order += await claimed(bench, 1)
    assert Counter(order) == {"heavy": 5, "light": 5}


async def test_idleness_is_not_saved_up(bench: StoreBench) -> None:
    await queue(bench, "late", 1)
    await claimed(bench, 1)
    await queue(bench, "heavy", 100)
    await claimed(bench, 60)
    await queue(bench, "late", 40)
    assert Counter(await claimed(bench, 20)) == {"heavy": 10, "late": 10}


async def test_priority_orders_a_line_and_not_the_turns(bench: StoreBench) -> None:
    plain = await queue(bench, "w", 3)
    urgent = await queue(bench, "w", 1, priority=100)
    await queue(bench, "other", 3)
    got = [one.execution.id for one in await bench.store.claim(0, "w1", 7)]
    assert [one for one in got if one in (*plain, *urgent)] == [*urgent, *plain]
    await queue(bench, "other", 2)
    await queue(bench, "w", 2, priority=100)
    assert Counter(await claimed(bench, 2)) == {"w": 1, "other": 1}


async def test_a_full_queue_refuses_who_filled_it(store_url: str) -> None:
    bench = open_store(store_url, backlog_max=20)
    await bench.client.flushall()
    try:
        await queue(bench, "heavy", 20)
        with pytest.raises(OverloadedError):
            await queue(bench, "heavy", 1)
        await queue(bench, "light", 10)
        with pytest.raises(OverloadedError):
            await queue(bench, "light", 1)
        await queue(bench, "third", 6)
        for workspace in ("heavy", "light", "third", "third"):
            with pytest.raises(OverloadedError):
                await queue(bench, workspace, 2)
        assert await depth(bench) < 2 * 20
    finally:
        await bench.calls.close()
        await bench.client.aclose()


async def test_a_place_that_becomes_free_is_the_first_in_lines(bench: StoreBench) -> None:
    await queue(bench, "heavy", 2)
    await bench.store.heartbeat(0, "w1", 60_000, 10)
    await queue(bench, "late", 1)
    assert await depth(bench) == 3  # although the worker has room: it was not the first to come
    assert len(await claimed(bench, 10)) == 3
    await queue(bench, "late", 1)
    assert await depth(bench) == 0  # nobody waits: straight to the worker


async def test_who_leaves_a_line_is_not_counted(bench: StoreBench) -> None:
    """A cancel without a worker: out of its line and in again, once."""
    first, _ = await queue(bench, "a", 2)
    await queue(bench, "b", 1)
    before = await bench.store.load(first)
    assert before is not None
    event = CancelRequested(NOW_MS, "enough")
    commit = Commit("cancel/1", None, before, evolve(before, event), (event,))
    assert isinstance(await bench.store.commit(commit), Committed)
    assert await depth(bench) == 3
    assert Counter(await claimed(bench, 10)) == {"a": 2, "b": 1}
    assert await depth(bench) == 0


async def test_nothing_is_left_of_lines_that_are_over(bench: StoreBench) -> None:
    for number in range(30):
        await queue(bench, f"w{number}", 1)
    assert len(await claimed(bench, 100)) == 30
    await queue(bench, "last", 2)
    await claimed(bench, 2)
    await queue(bench, "last", 1)
    kept = {key.decode().removeprefix(KEYS) for key in await bench.keys(f"{KEYS}*")}
    assert not {name for name in kept if name.startswith("line:")} - {"line:last"}
    assert int(await bench.client.zcard(f"{KEYS}owed")) <= 1


async def test_what_an_earlier_version_had_queued_is_not_lost(bench: StoreBench) -> None:
    ids = await queue(bench, "old", 3)
    await bench.store.claim(0, "gone", 3)
    for an_id in ids:
        await bench.client.hset(f"{KEYS}s:{an_id}", "owner", "")
    await bench.client.delete(f"{KEYS}owned:gone")
    await bench.client.zadd(f"{KEYS}ready", dict.fromkeys(ids, NOW_MS))
    assert (await bench.store.heartbeat(0, "w1", 1, 0)).ready_depth == 3
    assert len(await claimed(bench, 10)) == 3

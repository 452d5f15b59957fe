"""The hub: readers miss nothing and see nothing twice, whatever the bells do."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from serve_app.core.errors import StoreUnavailableError
from serve_app.core.execution import (
    ChunkEmitted,
    Event,
    Execution,
    ExecutionCompleted,
    ExecutionStarted,
    StepStarted,
    new_execution,
)
from serve_app.core.journal import Appended, ReadyRang, Resubscribed, StoredEvent
from serve_app.services import feeds as feeds_module
from serve_app.services.feeds import SWEEP_S, Feed, Feeds
from tests.support.memory_store import MemoryBells, MemoryStore
from tests.support.virtual_time import VirtualClock, virtual_time
from tests.support.workflows import CREATED, EXECUTION_ID, OUTPUT, T0

RUNNING = (ExecutionStarted(T0), StepStarted(T0, "s", 1))
END = ExecutionCompleted(T0, OUTPUT)
SOON_S = 0.01  # well below the sweep: what is seen by then was told, not swept


def chunk(index: int) -> ChunkEmitted:
    return ChunkEmitted(T0, "s", f"t{index}")


@dataclass
class Hub:
    """A hub over a store and bells, and what its renderer was asked for."""

    store: MemoryStore
    bells: MemoryBells
    feeds: Feeds
    rendered: list[int]

    def append(self, *events: Event) -> Appended:
        """Commit without a bell."""
        return self.store.append(EXECUTION_ID, *events)

    def ring(self, *events: Event) -> None:
        """Commit, and ring."""
        self.bells.ring(self.append(*events))


@asynccontextmanager
async def a_hub(*events: Event) -> AsyncIterator[Hub]:
    """A hub, and an execution with these events behind it."""
    rendered: list[int] = []

    def render(stored: StoredEvent, execution: Execution) -> bytes | None:
        assert execution.seq >= stored.seq
        rendered.append(stored.seq)
        is_shown = stored.seq > 1
        return b"%d:%s;" % (stored.seq, execution.status.encode()) if is_shown else None

    store, bells = MemoryStore(), MemoryBells()
    await store.create(EXECUTION_ID, CREATED, "create", "hub")
    store.append(EXECUTION_ID, *events)
    feeds = Feeds("hub", store, bells, VirtualClock(), render)
    running = asyncio.create_task(feeds.run())
    await bells.is_heard.wait()
    try:
        yield Hub(store, bells, feeds, rendered)
    finally:
        assert not running.done(), running
        running.cancel()
        await asyncio.wait((running,))


async def frames(hub: Hub, feed: Feed, cursor: int = 0, until: int | None = None) -> list[int]:
    """Sequence numbers a reader sees from a cursor, until one or until the end."""
    seen: list[int] = []
    while until is None or cursor < until:
        batch = await hub.feeds.next_frames(feed, cursor)
        if not batch:
            break
        seen.extend(seq for seq, _ in batch)
        cursor = seen[-1]
    return seen


@virtual_time
async def test_a_reader_sees_every_event_once_and_in_order() -> None:
    async with a_hub() as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        reading = asyncio.create_task(frames(hub, feed))
        hub.ring(*RUNNING)
        hub.ring(chunk(1))
        await asyncio.sleep(SOON_S)
        hub.ring(END)
        assert await reading == [1, 2, 3, 4, 5]
        assert feed.execution == hub.store.states[EXECUTION_ID]


@virtual_time
async def test_each_event_is_rendered_once_for_all_readers() -> None:
    new = new_execution("exe_00new", CREATED)
    async with a_hub() as hub, hub.feeds.begin(new, StoredEvent(1, "create", CREATED)) as feed:
        await hub.store.create(new.id, CREATED, "create", "hub")
        readers = [asyncio.create_task(frames(hub, feed)) for _ in range(50)]
        hub.bells.ring(hub.store.append(new.id, *RUNNING))
        await asyncio.sleep(SOON_S)
        hub.bells.ring(hub.store.append(new.id, END))
        assert await asyncio.gather(*readers) == [[1, 2, 3, 4]] * 50
        assert hub.rendered == [1, 2, 3, 4]
        assert hub.store.reads == []


@virtual_time
async def test_a_gap_between_notices_is_read_from_the_journal() -> None:
    async with a_hub() as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        hub.append(*RUNNING)  # its bell is lost
        hub.ring(chunk(1))
        assert await asyncio.wait_for(frames(hub, feed, until=4), SOON_S) == [1, 2, 3, 4]


@virtual_time
async def test_a_notice_too_large_to_carry_its_events_is_read_from_the_journal() -> None:
    async with a_hub() as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        hub.bells.ring(replace(hub.append(*RUNNING), events=()))
        assert await asyncio.wait_for(frames(hub, feed, until=3), SOON_S) == [1, 2, 3]


@virtual_time
async def test_a_repeated_or_late_notice_changes_nothing() -> None:
    async with a_hub() as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        early = hub.append(*RUNNING)
        late = hub.append(chunk(1))
        for notice in (early, late, early, late, ReadyRang(0)):
            hub.bells.ring(notice)
        await asyncio.sleep(SOON_S)
        hub.ring(END)
        assert await frames(hub, feed) == [1, 2, 3, 4, 5]


@virtual_time
async def test_a_lost_last_bell_is_found_by_the_sweep() -> None:
    async with a_hub(*RUNNING) as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        await asyncio.sleep(SOON_S)
        hub.append(END)
        ended = asyncio.create_task(feed.ended())
        await asyncio.sleep(SOON_S)
        assert not ended.done()
        assert (await asyncio.wait_for(ended, SWEEP_S + SOON_S)).data == OUTPUT
        assert await frames(hub, feed) == [1, 2, 3, 4]


@virtual_time
async def test_a_renewed_subscription_reads_what_was_not_heard() -> None:
    async with a_hub(*RUNNING) as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        await asyncio.sleep(SOON_S)
        hub.append(END)
        hub.bells.ring(Resubscribed())
        await asyncio.wait_for(feed.ended(), SOON_S)


@virtual_time
async def test_a_slow_reader_is_cut_over_to_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds_module, "FRAMES_MAX", 4)
    monkeypatch.setattr(feeds_module, "PAGE_MAX", 3)
    async with a_hub() as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        assert await frames(hub, feed, until=1) == [1]
        hub.ring(*RUNNING)
        for index in range(7):
            hub.ring(chunk(index))
        await asyncio.sleep(SOON_S)
        assert feed.frames_after(1) is None
        assert feed.frames_after(6) == [(seq, b"%d:running;" % seq) for seq in range(7, 11)]
        hub.store.reads.clear()
        assert await frames(hub, feed, 1, until=10) == list(range(2, 11))
        assert hub.store.reads == [(EXECUTION_ID, 1), (EXECUTION_ID, 4)]


@virtual_time
async def test_a_late_joiner_reads_the_past_and_then_goes_live() -> None:
    async with a_hub(*RUNNING, chunk(1)) as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        assert hub.store.watched == [(EXECUTION_ID, "hub")]
        assert await frames(hub, feed, until=4) == [1, 2, 3, 4]
        assert await frames(hub, feed, 3, until=4) == [4]
        reading = asyncio.create_task(frames(hub, feed, 4))
        hub.ring(END)
        assert await reading == [5]


@virtual_time
async def test_what_was_rung_before_the_feed_stood_is_read_at_once() -> None:
    async with a_hub(*RUNNING) as hub:
        watch = hub.store.watch

        async def watch_and_miss(execution_id: str, watcher: str) -> Execution | None:
            state = await watch(execution_id, watcher)
            hub.ring(END)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return state

        hub.store.watch = watch_and_miss
        async with hub.feeds.follow(EXECUTION_ID) as feed:
            await asyncio.wait_for(feed.ended(), SOON_S)


@virtual_time
async def test_an_ended_execution_is_read_to_its_end_and_no_further() -> None:
    async with a_hub(*RUNNING, END) as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        assert await frames(hub, feed) == [1, 2, 3, 4]
        assert await hub.feeds.next_frames(feed, 4) == []
        assert (await feed.ended()).data == OUTPUT


@virtual_time
async def test_the_end_is_rendered_with_the_state_it_gives() -> None:
    async with a_hub(*RUNNING) as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        hub.append(END)  # the reader's own page brings it, before any bell or sweep
        page = await hub.feeds.next_frames(feed, 0)
        assert page[-1] == (4, b"4:completed;")


@virtual_time
async def test_an_execution_that_is_not_there_has_no_feed() -> None:
    async with a_hub() as hub, hub.feeds.follow("exe_00none") as feed:
        assert feed is None


@virtual_time
async def test_readers_share_a_feed_until_the_last_one_leaves() -> None:
    async with a_hub(*RUNNING) as hub:
        async with hub.feeds.follow(EXECUTION_ID) as one:
            async with hub.feeds.follow(EXECUTION_ID) as two:
                assert one is two
            async with hub.feeds.follow(EXECUTION_ID) as three:
                assert one is three
        async with hub.feeds.follow(EXECUTION_ID) as four:
            assert four is not one
        assert len(hub.store.watched) == 2


@virtual_time
async def test_a_reader_may_give_up_waiting_and_come_back() -> None:
    async with a_hub(*RUNNING) as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        for _ in range(100):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(hub.feeds.next_frames(feed, 3), 10)
        assert len(feed._waiters) == 0
        reading = asyncio.create_task(frames(hub, feed, 3))
        hub.ring(END)
        assert await reading == [4]


@virtual_time
async def test_an_outage_of_the_store_is_outlived() -> None:
    async with a_hub(*RUNNING) as hub, hub.feeds.follow(EXECUTION_ID) as feed:
        await asyncio.sleep(SOON_S)
        hub.store.is_down = StoreUnavailableError("gone")
        hub.append(chunk(1))
        hub.ring(END)  # a gap that cannot be read now
        await asyncio.sleep(5 * SWEEP_S)
        assert not feed.execution.is_terminal
        hub.store.is_down = None
        await asyncio.wait_for(feed.ended(), SWEEP_S + SOON_S)


@virtual_time
async def test_a_feed_that_another_request_began_shows_what_was_accepted() -> None:
    other, accepted = (replace(CREATED, metadata={"from": name}) for name in ("other", "accepted"))
    async with a_hub() as hub:
        first = StoredEvent(1, "create", other)
        async with hub.feeds.begin(new_execution("exe_00new", other), first) as feed:
            feed.settle(accepted)
            assert feed.execution.created == accepted

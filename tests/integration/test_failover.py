"""Answers that lose their replica: over real links and the real router, with scripted engines."""

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import pytest

from serve_app.core.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    NoHostsAvailableError,
)
from serve_app.core.inference import ANYWHERE, Chunk, GenerationRequest, Message, Placement, Resumed
from tests.support.replicas import Replicas, replicas
from tests.support.scripted_engine import ScriptedEngine, joined, words

STREAMS = 20
TOKENS = 40
pytestmark = pytest.mark.timeout(60)


def a_request(request_id: str = "r1", tokens: int = TOKENS, **members: object) -> GenerationRequest:
    plain = GenerationRequest(
        request_id, (Message("user", "say it"),), max_tokens=tokens, temperature=0.0
    )
    return replace(plain, **members)


@dataclass
class Reader:
    """Reads one answer; `seen` wakes at each chunk."""

    fleet: Replicas
    request: GenerationRequest
    placement: Placement = ANYWHERE
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def text(self) -> str:
        return joined(self.chunks)

    async def read(self) -> "Reader":
        answer = self.fleet.inference.generate(self.request, self.placement)
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                self.chunks.append(chunk)
        return self


async def until(is_met: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_met():
            await asyncio.sleep(0.001)


def manual() -> ScriptedEngine:
    return ScriptedEngine(is_manual=True)


def step(fleet: Replicas, count: int = 1) -> None:
    for _ in range(count):
        for replica in fleet.living.values():
            replica.engine.step()


async def finish(fleet: Replicas, *tasks: "asyncio.Task[Reader]") -> None:
    async with asyncio.timeout(20):
        while not all(task.done() for task in tasks):
            step(fleet)
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("members", "rounds", "tokens"),
    [({}, 10, 60), ({"temperature": 1.0, "seed": 5}, 5, 400)],
    ids=["greedy", "seeded"],
)
async def test_twenty_streams_survive_kills(
    members: dict[str, object], rounds: int, tokens: int
) -> None:
    async with replicas(manual) as fleet:
        readers = [Reader(fleet, a_request(str(n), tokens, **members)) for n in range(STREAMS)]
        tasks = [asyncio.create_task(reader.read()) for reader in readers]
        for _ in range(rounds):
            before = [len(reader.token_ids) for reader in readers]
            await until(
                lambda: sum(len(r.engine.running) for r in fleet.living.values()) == STREAMS
            )
            # A seeded answer is made again from its start before there is anything new.
            step(fleet, max(before) + 3 if members else 3)
            await until(
                lambda before=before: all(
                    len(reader.token_ids) > count
                    for reader, count in zip(readers, before, strict=True)
                )
            )
            victim = max(fleet.living.values(), key=lambda one: len(one.engine.running))
            assert victim.engine.running
            await fleet.kill(victim.replica_id)
            await fleet.start()
        await finish(fleet, *tasks)
    expected = "".join(words(readers[0].request))
    assert {reader.text for reader in readers} == {expected}
    assert all(reader.token_ids == list(range(tokens)) for reader in readers)
    assert {reader.chunks[-1].resumed for reader in readers} <= {Resumed.EXACT, None}
    assert any(reader.chunks[-1].resumed for reader in readers)
    assert {one.chunks[-1].usage.completion_tokens for one in readers} == {tokens}


async def test_an_unseeded_sample_goes_on_and_says_so() -> None:
    async with replicas(manual) as fleet:
        reader = Reader(fleet, a_request(temperature=1.0))
        task = asyncio.create_task(reader.read())
        await lose(fleet, reader)
        await finish(fleet, task)
    assert reader.token_ids == list(range(TOKENS))
    assert (reader.chunks[0].resumed, reader.chunks[-1].resumed) == (None, Resumed.APPROXIMATE)


async def test_a_replay_that_differs_goes_on_from_what_was_said() -> None:
    made = 0

    def fickle() -> ScriptedEngine:
        nonlocal made
        made += 1
        name = f"e{made}"
        return ScriptedEngine(
            lambda request: [f"{name}.{n} " for n in range(request.max_tokens or 0)],
            is_manual=True,
            token_id=lambda index: 1000 * int(name[1:]) + index,
        )

    async with replicas(fickle) as fleet:
        reader = Reader(fleet, a_request(temperature=1.0, seed=3))
        task = asyncio.create_task(reader.read())
        await lose(fleet, reader)
        count = len(reader.token_ids)
        await finish(fleet, task)
    assert len(reader.token_ids) == TOKENS
    assert len({token // 1000 for token in reader.token_ids[:count]}) == 1
    assert [token % 1000 for token in reader.token_ids] == list(range(TOKENS))
    assert reader.chunks[-1].resumed is Resumed.APPROXIMATE


async def test_json_stays_json() -> None:
    document = json.dumps({"items": list(range(30))})
    parts = [document[at : at + 4] for at in range(0, len(document), 4)]

    def guided() -> ScriptedEngine:
        return ScriptedEngine(lambda _: parts, is_manual=True)

    async with replicas(guided) as fleet:
        reader = Reader(fleet, a_request(output_schema={"type": "object"}, tokens=100))
        task = asyncio.create_task(reader.read())
        for _ in range(3):
            await lose(fleet, reader)
            await fleet.start()
        await finish(fleet, task)
    assert json.loads(reader.text) == json.loads(document)


async def test_the_only_replica_may_come_back_under_another_name() -> None:
    async with replicas(manual, count=1) as fleet:
        reader = Reader(fleet, a_request())
        task = asyncio.create_task(reader.read())
        await lose(fleet, reader)
        await until(lambda: len(fleet.admitted) > 2)
        await fleet.start()
        await finish(fleet, task)
    assert reader.token_ids == list(range(TOKENS))


async def test_where_only_the_link_broke_the_same_replica_goes_on() -> None:
    async with replicas(manual, count=1) as fleet:
        reader = Reader(fleet, a_request())
        task = asyncio.create_task(reader.read())
        [replica] = fleet.living.values()
        await until(lambda: bool(replica.engine.running))
        step(fleet, 3)
        await until(lambda: bool(reader.token_ids))
        for connection in tuple(replica.server.connections):
            connection.break_off("cut by the test")
        await finish(fleet, task)
        assert replica.engine.aborted == ["r1"]
    assert reader.token_ids == list(range(TOKENS))


async def test_a_named_host_that_is_lost_is_replaced() -> None:
    async with replicas(manual) as fleet:
        reader = Reader(fleet, a_request(), Placement(host="host-2"))
        task = asyncio.create_task(reader.read())
        await until(lambda: bool(fleet.living["host-2"].engine.running))
        step(fleet, 2)
        await until(lambda: bool(reader.token_ids))
        await fleet.kill("host-2")
        await finish(fleet, task)
    assert reader.token_ids == list(range(TOKENS))


async def test_a_draining_replica_hands_its_streams_over() -> None:
    async with replicas(manual) as fleet:
        readers = [Reader(fleet, a_request(str(n))) for n in range(6)]
        tasks = [asyncio.create_task(reader.read()) for reader in readers]
        await until(lambda: sum(len(r.engine.running) for r in fleet.living.values()) == 6)
        step(fleet, 3)
        await until(lambda: all(len(reader.token_ids) == 3 for reader in readers))
        drained, heir = fleet.living.values()
        drained.phase = "draining"
        fleet.report()
        await until(lambda: fleet.router_knows(drained.replica_id) == "draining")
        step(fleet)  # said in the same turn as the hand-over, and not lost
        assert drained.server.hand_over() == 3
        await until(lambda: len(heir.engine.running) == 6)
        assert sorted(drained.engine.aborted) == sorted(set(drained.engine.aborted))
        assert drained.server.stream_count == 0
        await finish(fleet, *tasks)
        # One that comes with an old grant is refused in a way that sends it elsewhere.
        drained.phase = "ready"
        heir.phase = "draining"
        fleet.report()
        late = Reader(fleet, a_request("late"))
        task = asyncio.create_task(late.read())
        await until(lambda: len(fleet.admitted) > 13)
        heir.phase = "ready"
        await finish(fleet, task)
    assert all(reader.token_ids == list(range(TOKENS)) for reader in (*readers, late))


async def test_patience_ends() -> None:
    async with replicas(manual, count=1, resume_wait_s=0.2) as fleet:
        reader = Reader(fleet, a_request())
        task = asyncio.create_task(reader.read())
        await lose(fleet, reader)
        with pytest.raises(ConnectionFailedError):
            await task


async def test_a_deadline_ends_the_waiting() -> None:
    async with replicas(manual, count=1) as fleet:
        reader = Reader(fleet, a_request(deadline_ms=fleet.clock.now_ms() + 500))
        task = asyncio.create_task(reader.read())
        await lose(fleet, reader)
        with pytest.raises(DeadlineExceededError):
            await task


async def test_a_request_that_kills_replicas_is_not_passed_on_for_ever() -> None:
    def deadly() -> ScriptedEngine:
        return ScriptedEngine(errors={name: (0, ConnectionFailedError("it died")) for name in IDS})

    async with replicas(deadly, count=5) as fleet:
        with pytest.raises(ConnectionFailedError):
            await Reader(fleet, a_request()).read()
        assert len(fleet.admitted) == 3


async def test_without_any_replica_the_refusal_is_at_once() -> None:
    async with replicas(count=0) as fleet:
        with pytest.raises(NoHostsAvailableError):
            await Reader(fleet, a_request()).read()
        assert len(fleet.admitted) == 1


async def test_a_caller_that_leaves_while_waiting_leaves_nothing() -> None:
    async with replicas(manual, count=1) as fleet:
        reader = Reader(fleet, a_request())
        task = asyncio.create_task(reader.read())
        await lose(fleet, reader)
        await until(lambda: len(fleet.admitted) > 2)
        task.cancel()
        await asyncio.wait([task])
        replica = await fleet.start()
        await asyncio.sleep(0.05)
        assert replica.engine.submitted == []


IDS = ("r1", "r1~2", "r1~3", "r1~4")


async def lose(fleet: Replicas, reader: Reader) -> None:
    """Have a reader's replica die after it said a little more."""
    count = len(reader.token_ids)
    await until(lambda: any(one.engine.running for one in fleet.living.values()))
    step(fleet, 3)
    await until(lambda: len(reader.token_ids) > count)
    victim = next(one for one in fleet.living.values() if one.engine.running)
    await fleet.kill(victim.replica_id)

"""Whether the promises of the README were kept: the journals and keys against the outside ledger.

Every function returns what is wrong, in words; nothing wrong is an empty list.
"""

import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import orjson
from redis.asyncio import Redis

from serve_app.core.execution import Execution, SignalReceived, SignalTaken, StepStarted
from serve_app.core.gates import Verdict
from serve_app.core.journal import StoredEvent
from serve_app.ports import ExecutionStore
from tests.support.chaos.driver import family_member
from tests.support.chaos.ledger import Ledger
from tests.support.chaos.oracle import Expected, Oracle
from tests.support.chaos.world import PARTITIONS, WORKSPACE, World
from tests.support.checker import entries_of_stored, journal_problems, view_problems

PAGE = 1000
_OWNERS = re.compile(r"^(\d+)\.\d+$")  # an owner's commit: its token's number, a counter
# What may be left when nothing runs, beside what a time to live takes away.
_KEPT = re.compile(
    r"ip:\{\d+\}:(ix:.*|ends|tokens|capacity|dx:.*|dh:.*|dw|dc|dn|seen|sync)"
    r"|ip:\{config\}:.*"
)


@dataclass
class Found:
    """What the store has of one execution."""

    execution: Execution
    journal: Sequence[StoredEvent]


@dataclass
class Verdicts:
    """What a run came to."""

    problems: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)


async def judge(world: World, oracle: Oracle) -> Verdicts:
    """Judge a run in which nothing moves any more."""
    store: ExecutionStore = world.services.executions._store
    found = {one: await read(store, one) for one in await _stored_ids(world)}
    verdicts = judge_executions(found, world.ledger, oracle, PARTITIONS)
    verdicts.problems += [text async for text in _remains(world)]
    verdicts.problems += await _usage_problems(world, found)
    return verdicts


def judge_executions(
    found: Mapping[str, Found], ledger: Ledger, oracle: Oracle, partition_count: int
) -> Verdicts:
    """Judge all executions that a store has, children included."""
    verdicts = Verdicts()
    for execution_id in ledger.accepted.keys() - found.keys():
        verdicts.problems.append(f"{execution_id}: accepted and lost")
    for execution_id, one in found.items():
        verdicts.statuses[one.execution.status] += 1
        texts = [
            *journal_problems(entries_of_stored(one.journal)),
            *owner_problems(one.journal),
            *signal_problems(one, [name for eid, name in ledger.signalled if eid == execution_id]),
        ]
        if execution_id in ledger.views:
            entries = entries_of_stored(one.journal)
            texts += [f"a reader: {t}" for t in view_problems(ledger.views[execution_id], entries)]
        if (plan := ledger.accepted.get(execution_id)) is not None:
            expected = oracle.expected(plan.workflow_id, plan.input)
            is_cancelled = execution_id in ledger.cancelled or (
                execution_id in ledger.cancel_tried and one.execution.status == "cancelled"
            )
            texts += outcome_problems(one.execution, expected, is_cancelled=is_cancelled)
            texts += call_problems(execution_id, found, expected, ledger, partition_count)
        verdicts.problems += [f"{execution_id}: {text}" for text in texts]
    verdicts.problems += effect_problems(found, ledger)
    verdicts.problems += hook_problems(found, ledger)
    verdicts.problems += family_problems(found)
    return verdicts


async def read(store: ExecutionStore, execution_id: str) -> Found:
    """All of one execution."""
    execution = await store.load(execution_id)
    assert execution is not None
    journal: list[StoredEvent] = []
    while page := await store.read(execution_id, len(journal), PAGE):
        journal += page
    return Found(execution, journal)


def owner_problems(journal: Sequence[StoredEvent]) -> Iterator[str]:
    """Tokens grow with every change of owner: an older one after a newer one is a stale owner."""
    last = 0
    for stored in journal:
        match = _OWNERS.match(stored.commit_id)
        if match is None:
            continue
        if int(match[1]) < last:
            yield f"event {stored.seq} by token {match[1]}, after token {last} had taken over"
        last = max(last, int(match[1]))


def signal_problems(one: Found, names: Sequence[str]) -> Iterator[str]:
    """What was acknowledged is in the journal; a wait that it fits has taken it, once."""
    received = {s.seq: s.event.name for s in one.journal if isinstance(s.event, SignalReceived)}
    taken = Counter(s.event.seq for s in one.journal if isinstance(s.event, SignalTaken))
    for name in names:
        if name not in received.values():
            yield f"the signal {name!r} was acknowledged and is not there"
    for seq, times in taken.items():
        if times > 1 or seq not in received:
            yield f"the signal {seq} was taken {times} times"
    taken_names = {received.get(seq) for seq in taken}
    for name in names:
        state = one.execution.steps.get(name)
        if one.execution.status == "completed" and state is not None and name not in taken_names:
            yield f"the signal {name!r} was acknowledged, waited for and not taken"


def outcome_problems(
    execution: Execution, expected: Expected, *, is_cancelled: bool
) -> Iterator[str]:
    """The status, and where it completed the value, that the oracle says."""
    if not execution.is_terminal:
        yield f"still {execution.status}"
        return
    if is_cancelled:
        if execution.status != "cancelled":
            yield f"its cancel was acknowledged, and it is {execution.status}"
        return
    if execution.status != expected.status:
        yield f"{execution.status} ({execution.error}) instead of {expected.status}"
    elif execution.status == "completed" and execution.data != expected.data:
        yield f"gives {execution.data!r} instead of {expected.data!r}"
    elif execution.error_code != expected.error_code:
        yield f"failed with {execution.error_code} instead of {expected.error_code}"


def call_problems(
    top: str, found: Mapping[str, Found], expected: Expected, ledger: Ledger, partition_count: int
) -> Iterator[str]:
    """A completed execution and its children have called what they had to, and nothing else."""
    member = {family: family_member(top, family, partition_count) for family in expected.children}
    member[()] = top
    if found[top].execution.status != "completed":
        return
    must = {f"{member[family]}/{path}/{n}": family for family, path, n in expected.calls}
    ids = set(member.values())
    seen = {call.key for call in ledger.calls if call.key.partition("/")[0] in ids}
    for key in must.keys() - seen:
        # Who took the result of another one calls nobody, and neither do those below it.
        if not any(_has_hit(found, member[above]) for above in _line_of(must[key])):
            yield f"its call {key} was never made"
    for key in seen - must.keys():
        if not any(_is_loose(key, member, *one) for one in expected.loose):
            yield f"the call {key} was no part of it"


def _line_of(family: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A member of a family and all above it."""
    for end in range(len(family) + 1):
        yield family[:end]


def _has_hit(found: Mapping[str, Found], execution_id: str) -> bool:
    one = found.get(execution_id)
    return one is not None and one.execution.verdict is Verdict.HIT


def _is_loose(
    key: str, member: Mapping[tuple[str, ...], str], family: tuple[str, ...], path: str
) -> bool:
    """Whether a call was made in a map's item that failed, or by a child that was started there."""
    owner, _, place = key.partition("/")
    depth = len(family)
    return (owner == member[family] and place.startswith(path)) or any(
        owner == member[one] and one[:depth] == family and one[depth].startswith(path)
        for one in member
        if len(one) > depth
    )


def effect_problems(found: Mapping[str, Found], ledger: Ledger) -> Iterator[str]:
    """A key is stable, and is called no more often than its attempt was durably started."""
    bodies: dict[str, set[bytes]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for call in ledger.calls:
        bodies[call.key].add(call.body)
        counts[call.key] += 1
    started: Counter[str] = Counter(
        f"{execution_id}/{stored.event.step_id}/{stored.event.attempt}"
        for execution_id, one in found.items()
        for stored in one.journal
        if isinstance(stored.event, StepStarted)
    )
    for key, count in counts.items():
        if len(bodies[key]) > 1:
            yield f"{key}: called with {len(bodies[key])} different bodies under one key"
        if count > started[key]:
            yield f"{key}: called {count} times and started {started[key]} times"


def hook_problems(found: Mapping[str, Found], ledger: Ledger) -> Iterator[str]:
    """Every end was told at least once, under one id."""
    ids: dict[str, set[str]] = defaultdict(set)
    for hook in ledger.hooks:
        ids[hook.execution_id].add(hook.message_id)
        one = found.get(hook.execution_id)
        if one is None or hook.kind != f"workflow.{one.execution.status}":
            yield f"{hook.execution_id}: a webhook says {hook.kind}"
    for execution_id in found:
        if len(ids[execution_id]) != 1:
            yield f"{execution_id}: told under {len(ids[execution_id])} webhook ids instead of one"


def family_problems(found: Mapping[str, Found]) -> Iterator[str]:
    """A child's parent is there, and no child outlives the family."""
    for execution_id, one in found.items():
        parent = one.execution.created.parent
        if parent is not None and parent not in found:
            yield f"{execution_id}: a child of {parent}, which is not there"
        if not one.execution.is_terminal and execution_id:
            yield f"{execution_id}: still {one.execution.status} at the end"


async def _stored_ids(world: World) -> list[str]:
    ids: list[str] = []
    async with world.look() as client:
        async for key in client.scan_iter("ip:*:ix:" + WORKSPACE, count=1000):
            ids += [one.decode() for one in await client.zrange(key, 0, -1)]
    return ids


async def quiet(world: World) -> list[str]:
    """What still moves: work, timers, leases, messages, gate places, deliveries."""
    return [text async for text in _remains(world)]


async def _remains(world: World) -> AsyncIterator[str]:
    """Keys that should not be there when nothing runs, and leases of the dead."""
    async with world.look() as client:
        async for raw in client.scan_iter("*", count=1000):
            async for text in _remains_of(world, client, raw.decode()):
                yield text


async def _remains_of(world: World, client: "Redis[bytes]", key: str) -> AsyncIterator[str]:
    names = {actor.name for actor in world.actors}
    if key.endswith((":outbox", ":dead")):
        if length := await client.xlen(key):
            yield f"{key}: {length} messages are left"
    elif ":log:" in key or ":ev:" in key:
        if twice := repeated([_message_id(row) for _, row in await client.xrange(key)]):
            yield f"{key}: applied more than once: {twice}"
    elif key.endswith(":workers"):
        alive = await client.zrangebyscore(key, world.services.clock.now_ms(), "+inf")
        owners = {one.decode().rpartition("~")[2] for one in alive}
        if without := {actor.name for actor in world.of_role("executor")} - owners:
            yield f"{key}: no lease has {without}"
    elif key.rpartition(":do:")[2] in names:
        if await client.hkeys(key) != [b"#"]:
            yield f"{key}: deliveries are still under way"
    elif not _KEPT.fullmatch(key) and await client.ttl(key) == -1:
        yield f"{key} is left"


def _message_id(row: Mapping[bytes, bytes]) -> str:
    return row[b"m"].decode() if b"m" in row else str(orjson.loads(row[b"b"])["id"])


def repeated(ids: Sequence[str]) -> list[str]:
    """Those that are there more than once."""
    return [one for one, times in Counter(ids).items() if times > 1]


async def _usage_problems(world: World, found: Mapping[str, Found]) -> list[str]:
    """The ledger of usage has every execution once, with all its tokens."""
    booked: Counter[str] = Counter()
    async with world.look() as client:
        async for key in client.scan_iter("ip:*:use:*", count=1000):
            for name, count in (await client.hgetall(key)).items():
                booked[re.split(r"[^a-z]", name.decode())[-1]] += int(count)
    journals = sum(one.execution.usage.completion_tokens for one in found.values())
    problems = []
    if booked["requests"] != len(found):
        problems.append(f"usage: {booked['requests']} requests booked, {len(found)} executions")
    if booked["completion"] != journals:
        problems.append(f"usage: {booked['completion']} tokens booked, {journals} in the journals")
    return problems

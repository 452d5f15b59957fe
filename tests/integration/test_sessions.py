"""Sessions: turns one after the other, kept whole or not at all, whoever dies in between."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.adapters.redis_sessions import RedisSessions
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.core.errors import (
    ConnectionFailedError,
    InvalidPromptError,
    RateLimitExceededError,
    StaleLeaseError,
    UnknownSessionError,
)
from serve_app.core.session import SessionLimits, SessionMessage
from serve_app.ports import TurnLine
from serve_app.services.sessions import Sessions
from tests.integration.conftest import PARTITIONS, StoreBench
from tests.support.scripted_engine import ScriptedEngine
from tests.support.sockets import Stage, Talk, staged, text_of

LIMITS = SessionLimits(messages_max=6, bytes_max=200, waiting_max=2, lease_ms=400)
TURN = (SessionMessage("user", "q", 1), SessionMessage("assistant", "a", 2))


def sessions_of(bench: StoreBench, limits: SessionLimits = LIMITS) -> Sessions:
    store = RedisSessions(bench.calls, PARTITIONS)
    return Sessions(store, SystemClock(), SystemEntropy(), limits)


async def contents(sessions: Sessions, session_id: str) -> list[str]:
    session = await sessions.find("ws", session_id)
    return [message.content for message in await sessions.messages(session, 0, 100)]


async def test_a_turn_is_told_of_all_turns_before_it(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    made = await sessions.create("ws", "m", "be brief")
    for prompt, answer in (("one", "1"), ("two", "2")):
        async with sessions.turn("ws", made.id, prompt) as turn:
            await sessions.keep(turn, prompt, answer)
    async with sessions.turn("ws", made.id, "three") as turn:
        told = [(m.role, m.content) for m in turn.messages("three")]
    assert told == [
        ("system", "be brief"), ("user", "one"), ("assistant", "1"),
        ("user", "two"), ("assistant", "2"), ("user", "three"),
    ]  # fmt: skip
    assert await contents(sessions, made.id) == ["be brief", "one", "1", "two", "2"]
    found = await sessions.find("ws", made.id)
    assert (found.message_count, found.byte_count) == (4, 8)


async def test_turns_of_one_session_run_one_after_the_other_on_any_ingress(
    bench: StoreBench,
) -> None:
    many = [sessions_of(bench, replace(LIMITS, waiting_max=9, messages_max=100)) for _ in range(3)]
    made = await many[0].create("ws", "m", "")
    running = 0

    async def one(index: int) -> None:
        nonlocal running
        sessions = many[index % len(many)]
        async with sessions.turn("ws", made.id, f"q{index}") as turn:
            running += 1
            assert running == 1
            assert len(turn.kept) % 2 == 0
            await asyncio.sleep(0.01)
            running -= 1
            await sessions.keep(turn, f"q{index}", f"a{index}")

    await asyncio.gather(*(one(index) for index in range(9)))
    said = await contents(many[0], made.id)
    assert [answer.replace("a", "q") for answer in said[1::2]] == said[0::2]
    assert sorted(said[0::2]) == sorted(f"q{index}" for index in range(9))


async def test_a_turn_that_fails_is_not_kept_and_the_next_goes_on(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    made = await sessions.create("ws", "m", "")
    with pytest.raises(ConnectionFailedError):
        async with sessions.turn("ws", made.id, "one"):
            raise ConnectionFailedError("lost")
    async with sessions.turn("ws", made.id, "two") as turn:
        await sessions.keep(turn, "two", "2")
    assert await contents(sessions, made.id) == ["two", "2"]


async def test_the_line_is_bounded(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    made = await sessions.create("ws", "m", "")
    store = RedisSessions(bench.calls, PARTITIONS)
    lines = [await store.join(made.id, f"t{index}", LIMITS) for index in range(4)]
    assert lines == [TurnLine.RUNNING, TurnLine.WAITING, TurnLine.WAITING, TurnLine.FULL]
    with pytest.raises(RateLimitExceededError):
        async with sessions.turn("ws", made.id, "x"):
            pytest.fail("it was full")
    await store.leave(made.id, "t0")
    assert await store.hold(made.id, "t2", LIMITS) is TurnLine.WAITING
    assert await store.hold(made.id, "t1", LIMITS) is TurnLine.RUNNING


async def test_a_dead_turn_holds_the_others_up_for_a_lease_and_can_keep_nothing(
    bench: StoreBench,
) -> None:
    sessions = sessions_of(bench)
    store = RedisSessions(bench.calls, PARTITIONS)
    made = await sessions.create("ws", "m", "")
    assert await store.join(made.id, "dead", LIMITS) is TurnLine.RUNNING
    async with sessions.turn("ws", made.id, "two") as turn:
        assert await store.keep(made.id, "dead", TURN, LIMITS.idle_ms) is TurnLine.LOST
        assert await store.hold(made.id, "dead", LIMITS) is TurnLine.LOST
        await sessions.keep(turn, "two", "2")
    assert await contents(sessions, made.id) == ["two", "2"]


async def test_a_turn_that_runs_long_keeps_its_place(bench: StoreBench) -> None:
    sessions = sessions_of(bench, replace(LIMITS, lease_ms=300))
    made = await sessions.create("ws", "m", "")
    async with sessions.turn("ws", made.id, "one") as turn:
        await asyncio.sleep(0.9)  # three leases
        await sessions.keep(turn, "one", "1")
    assert await contents(sessions, made.id) == ["one", "1"]


async def test_what_runs_under_a_lost_lease_is_ended(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    store = RedisSessions(bench.calls, PARTITIONS)
    made = await sessions.create("ws", "m", "")

    async def lose() -> None:
        async with sessions.turn("ws", made.id, "one") as turn:
            await store.leave(made.id, turn.id)
            await asyncio.sleep(5)

    with pytest.raises(StaleLeaseError):
        await lose()
    assert await contents(sessions, made.id) == []


async def test_a_keep_that_is_sent_twice_keeps_once(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    store = RedisSessions(bench.calls, PARTITIONS)
    made = await sessions.create("ws", "m", "")
    await store.join(made.id, "t", LIMITS)
    for _ in range(2):
        assert await store.keep(made.id, "t", TURN, LIMITS.idle_ms) is TurnLine.RUNNING
        assert await store.hold(made.id, "t", LIMITS) is TurnLine.RUNNING  # a late renewal
    assert await contents(sessions, made.id) == ["q", "a"]
    assert await store.join(made.id, "next", LIMITS) is TurnLine.RUNNING


async def test_ending_ends_the_turn_that_runs_and_those_that_wait(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    made = await sessions.create("ws", "m", "")

    async def turn() -> None:
        async with sessions.turn("ws", made.id, "x"):
            await asyncio.sleep(5)

    turns = [asyncio.ensure_future(turn()) for _ in range(2)]
    await asyncio.sleep(0.05)
    await sessions.end("ws", made.id)
    ends = await asyncio.gather(*turns, return_exceptions=True)
    assert [type(end) for end in ends] == [UnknownSessionError, UnknownSessionError]
    assert await bench.client.keys("*:se:*") == []


async def test_another_workspace_and_odd_ids_are_unknown(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    made = await sessions.create("ws", "m", "")
    for workspace, wanted in (
        ("other", made.id), ("ws", "ses_00nobody"), ("ws", "ses_ffnobody"), ("ws", "ses_zz"),
        ("ws", "exe_00x"), ("ws", ""), ("ws", "ses_0"),
    ):  # fmt: skip
        with pytest.raises(UnknownSessionError):
            await sessions.find(workspace, wanted)
        with pytest.raises(UnknownSessionError):
            async with sessions.turn(workspace, wanted, "x"):
                pytest.fail("there is none")


@pytest.mark.parametrize(("size", "has_room"), [(195, True), (196, True), (197, False)])
async def test_text_is_bounded(bench: StoreBench, size: int, has_room: bool) -> None:
    sessions = sessions_of(bench)
    made = await sessions.create("ws", "m", "")
    async with sessions.turn("ws", made.id, "é") as turn:
        await sessions.keep(turn, "é", "é")  # two bytes each
    try:
        async with sessions.turn("ws", made.id, "x" * size):
            assert has_room
    except InvalidPromptError:
        assert not has_room


async def test_messages_are_bounded(bench: StoreBench) -> None:
    sessions = sessions_of(bench)
    made = await sessions.create("ws", "m", "")
    for _ in range(3):
        async with sessions.turn("ws", made.id, "q") as turn:
            await sessions.keep(turn, "q", "a")
    with pytest.raises(InvalidPromptError, match="holds 6 of 6 messages"):
        async with sessions.turn("ws", made.id, "q"):
            pytest.fail("it is full")


async def test_an_idle_session_is_gone_and_a_used_one_is_kept(bench: StoreBench) -> None:
    sessions = sessions_of(bench, replace(LIMITS, idle_ms=600))
    idle, used = [await sessions.create("ws", "m", "") for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(0.3)
        async with sessions.turn("ws", used.id, "q") as turn:
            await sessions.keep(turn, "q", "a")
    assert len(await contents(sessions, used.id)) == 6
    with pytest.raises(UnknownSessionError):
        await sessions.find("ws", idle.id)


@pytest.fixture
async def stage(valkey_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    """An engine that answers with the number of messages it was asked with."""
    engine = ScriptedEngine(script=lambda request: [f"{len(request.messages)} ", "messages"])
    async with staged(valkey_url, tmp_path, engine) as stage:
        yield stage


async def begin(stage: Stage, **wish: object) -> str:
    made = await stage.api.http.post("/v1/sessions", json={"model": "scripted", **wish})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def say(talk: Talk, session_id: str, prompt: str = "hello", **more: object) -> str:
    await talk.ask(prompt, session_id=session_id, **more)
    said = await talk.to_end()
    assert said[-1]["type"] == "stream_end", said
    return text_of(said)


async def test_a_session_over_http_and_socket(stage: Stage) -> None:
    session_id = await begin(stage, system="be brief")
    async with stage.socket() as talk:
        assert await say(talk, session_id, "one") == "2 messages"
        assert await say(talk, session_id, "two", stream=False) == "4 messages"
    http = stage.api.http
    shown = (await http.get(f"/v1/sessions/{session_id}")).json()
    assert shown["model"] == "scripted"
    assert (shown["system"], shown["messageCount"]) == ("be brief", 5)
    pages, cursor = [], "0"
    while cursor:
        page = (
            await http.get(f"/v1/sessions/{session_id}/messages?cursor={cursor}&limit=2")
        ).json()
        pages.append([(item["role"], item["content"]) for item in page["items"]])
        cursor = page["nextCursor"]
    assert pages == [
        [("system", "be brief"), ("user", "one")],
        [("assistant", "2 messages"), ("user", "two")],
        [("assistant", "4 messages")],
    ]
    asked = stage.router.admitted[-1]
    assert (asked.session, asked.tenant) == (f"default/{session_id}", "default")
    assert (await http.delete(f"/v1/sessions/{session_id}")).status_code == 204
    for answer in (
        await http.get(f"/v1/sessions/{session_id}"),
        await http.get(f"/v1/sessions/{session_id}/messages"),
        await http.delete(f"/v1/sessions/{session_id}"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "UNKNOWN_SESSION")
    async with stage.socket() as talk:
        await talk.ask(session_id=session_id)
        assert (await talk.next())["error"]["code"] == "UNKNOWN_SESSION"  # type: ignore[index]


async def test_a_cancelled_timed_out_or_left_turn_stores_nothing(
    valkey_url: str, tmp_path: Path
) -> None:
    engine = ScriptedEngine(is_manual=True)
    async with staged(valkey_url, tmp_path, engine) as stage:
        session_id = await begin(stage)
        async with stage.socket() as talk:
            await talk.ask(request_id="a", session_id=session_id)
            await stage.until("engine.running")
            engine.step()
            await talk.next()
            await talk.ask(request_id="b", session_id=session_id, timeout=50)  # it waits for a
            assert (await talk.next())["error"]["code"] == "INFERENCE_TIMEOUT"  # type: ignore[index]
            await talk.send({"type": "cancel", "request_id": "a"})
            assert (await talk.next())["finish_reason"] == "cancelled"
            await talk.ask(request_id="c", session_id=session_id)
            await stage.until("engine.running")
        await stage.until("len(engine.aborted) == 2")
        async with stage.socket() as talk:
            await talk.ask(session_id=session_id, max_tokens=1)
            await stage.until("engine.running")
            engine.step()
            assert text_of(await talk.to_end()) == "t0 "
        page = (await stage.api.http.get(f"/v1/sessions/{session_id}/messages")).json()
        assert [item["content"] for item in page["items"]] == ["say it", "t0 "]


async def test_turns_sent_at_once_are_answered_in_order(stage: Stage) -> None:
    session_id = await begin(stage)
    async with stage.socket() as talk:
        for index in range(4):
            await talk.ask(f"q{index}", request_id=f"r{index}", session_id=session_id, stream=False)
        order = [
            m["request_id"] for _ in range(8) if (m := await talk.next())["type"] == "stream_end"
        ]
    assert order == ["r0", "r1", "r2", "r3"]


async def test_refusals_around_sessions(stage: Stage) -> None:
    http = stage.api.http
    for body in ({}, {"model": ""}, {"model": "m", "x": 1}, {"model": "m", "system": ""}):
        assert (await http.post("/v1/sessions", json=body)).status_code == 422
    session_id = await begin(stage)
    for query in ("cursor=x", "cursor=-1", "cursor=9999999999"):
        answer = await http.get(f"/v1/sessions/{session_id}/messages?{query}")
        assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_CURSOR")
    for query in ("limit=0", "limit=201", "limit=x"):
        assert (await http.get(f"/v1/sessions/{session_id}/messages?{query}")).status_code == 422
    async with stage.socket() as talk:
        await talk.ask(session_id=session_id, model="another")
        assert (await talk.next())["error"]["code"] == "INVALID_REQUEST"  # type: ignore[index]
    other = await stage.api.new_workspace("other")
    answer = await http.get(f"/v1/sessions/{session_id}", headers=other)
    assert answer.status_code == 404
    reader = await stage.api.new_key("read")
    assert (await http.get(f"/v1/sessions/{session_id}", headers=reader)).status_code == 200
    made = await http.post("/v1/sessions", json={"model": "scripted"}, headers=reader)
    assert made.status_code == 403


async def test_a_repeated_creation_makes_one_session(stage: Stage) -> None:
    key = {"Idempotency-Key": "s1"}
    made = [
        await stage.api.http.post("/v1/sessions", json={"model": "scripted"}, headers=key)
        for _ in range(2)
    ]
    assert made[0].json()["id"] == made[1].json()["id"]
    assert made[1].headers["Idempotency-Replayed"] == "true"

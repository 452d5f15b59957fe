"""The fake server that users get: it does what the service does, and what its script says."""

import asyncio
from collections.abc import Callable

import pytest

from inferpipe import (
    ExecutionFailedError,
    InferPipe,
    InferPipeConnectionError,
    InvalidArgumentError,
    NotFoundError,
    RateLimitedError,
)
from inferpipe.testing import FakeServer
from inferpipe.wire import UsageView
from tests.support.sdk_contract import CHECKS, Workflows

IDS = Workflows("echo", "chat", "broken", "slow", "waiting")


def contract_server() -> FakeServer:
    fake = FakeServer()
    fake.answers(IDS.echoing, lambda given: given)
    fake.completes(IDS.texting, chunks=["Once ", "upon ", "a time"])
    fake.fails(IDS.failing, "no such member", chunks=[])
    fake.holds(IDS.endless, chunks=["Once ", "upon"])
    fake.awaits(IDS.waiting, "ask")
    return fake


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_fake_keeps_the_contract(check: Callable[[InferPipe, Workflows], None]) -> None:
    with contract_server().client() as client:
        check(client, IDS)


def test_the_guides_unit_test() -> None:
    fake = FakeServer()
    fake.completes("content-moderation", {"approved": True})
    with fake.client() as client:
        assert client.execute("content-moderation", {"content": "hi"}).data == {"approved": True}
    (call,) = fake.calls
    assert (call.workflow_id, call.input, call.mode) == (
        "content-moderation", {"content": "hi"}, "sync"
    )  # fmt: skip


def test_recorded_call_has_the_options() -> None:
    fake = FakeServer()
    fake.completes("w")
    with fake.client(api_key="k" * 16) as client:
        client.execute_async("w", {}, metadata={"a": 1}, timeout_ms=5, idempotency_key="mine")
    (call,) = fake.calls
    assert (call.request.metadata, call.request.timeout, call.mode) == ({"a": 1}, 5, "async")
    assert call.idempotency_key == "mine"
    assert call.headers["authorization"] == "Bearer " + "k" * 16
    assert "k" * 16 not in repr(call)


def test_scripts_are_used_in_turn_the_last_one_for_ever() -> None:
    fake = FakeServer()
    fake.loses("w")
    fake.refuses("w", 429, "RATE_LIMIT_EXCEEDED", retry_after_s=7)
    fake.fails("w", "first")
    fake.completes("w", 1)
    with fake.client() as client:
        with pytest.raises(ExecutionFailedError, match="first"):
            client.execute("w", {})
        assert [client.execute("w", {}).data for _ in range(2)] == [1, 1]
    assert len({call.idempotency_key for call in fake.calls[:3]}) == 1  # the client tried again


def test_trouble_that_stays_reaches_the_caller() -> None:
    fake = FakeServer()
    fake.loses("gone")
    fake.refuses("busy", 429, "RATE_LIMIT_EXCEEDED", retry_after_s=7)
    with fake.client() as client:
        with pytest.raises(InferPipeConnectionError):
            client.execute("gone", {})
        with pytest.raises(RateLimitedError) as caught:
            client.execute_async("busy", {})
    assert caught.value.retry_after_s == 7


def test_arguments_are_checked_as_ever() -> None:
    with FakeServer().client() as client, pytest.raises(InvalidArgumentError):
        client.execute("w", {"x": float("nan")})


def test_what_is_not_scripted_is_refused_in_words() -> None:
    with FakeServer().client() as client:
        with pytest.raises(NotFoundError):
            client.execute("w", {})
        with pytest.raises(AssertionError, match=r"fake.script\('GET /v1/usage'"):
            client.usage()


def test_other_calls_are_scripted_by_their_line() -> None:
    fake = FakeServer()
    fake.script("GET /v1/usage", {"items": [], "totals": {"totalTokens": 5}})
    fake.script("DELETE /v1/keys/k1", None, status=204)
    with fake.client() as client:
        assert client.usage(group_by="day").totals.total_tokens == 5
        assert client.usage().totals.total_tokens == 5
        client.keys.revoke("k1")


def test_held_execution_ends_when_the_test_says_so() -> None:
    fake = FakeServer()
    fake.holds("w", chunks=["so far"])
    with fake.client() as client:
        first, second = (client.execute_async("w", {}).id for _ in range(2))
        assert client.get_execution(first).status == "running"
        stream = iter(client.executions.follow(first))
        assert next(stream).data == "so far"
        fake.finish(first, {"done": True})
        assert list(stream) == []
        fake.fail(second, "broke", error_code="TIMEOUT")
        with pytest.raises(ExecutionFailedError) as caught:
            client.executions.follow(second).wait()
        assert caught.value.result.error_code == "TIMEOUT"
        with pytest.raises(AssertionError, match="has ended already"):
            fake.finish(first)


def test_waiting_for_a_held_execution_says_so_instead_of_hanging() -> None:
    fake = FakeServer()
    fake.holds("w")
    with fake.client() as client:
        with pytest.raises(AssertionError, match="is held"):
            client.execute("w", {})
        with pytest.raises(AssertionError, match="is held"):
            list(client.execute_stream("w", {}))


def test_signals_are_recorded() -> None:
    fake = FakeServer()
    fake.holds("approval")
    with fake.client() as client:
        started = client.execute_async("approval", {})
        client.executions.signal(started.id, "approve", {"by": "me"})
    assert fake.signals == [(started.id, "approve", {"by": "me"})]


def test_usage_is_as_scripted() -> None:
    fake = FakeServer()
    fake.completes("w", chunks=["a"], usage=UsageView(completion_tokens=1, total_tokens=1))
    with fake.client() as client:
        assert client.execute("w", {}).usage.completion_tokens == 1


def test_async_client() -> None:
    fake = contract_server()

    async def run() -> list[str]:
        async with fake.async_client() as client:
            assert (await client.execute(IDS.echoing, {"n": 1})).data == {"n": 1}
            assert [one.id async for one in client.executions.list()] == ["exe_fake1"]
            async with client.execute_stream(IDS.texting, {}) as stream:
                chunks = [chunk.data async for chunk in stream]
            assert stream.result.data == "Once upon a time"
            with pytest.raises(ExecutionFailedError):
                await client.execute(IDS.failing, {})
            return chunks

    assert asyncio.run(run()) == ["Once ", "upon ", "a time"]

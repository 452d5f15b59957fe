"""A dispatcher against receivers that fail in every way, and a dispatcher that dies."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from serve_app.core import delivery
from serve_app.core.journal import Outgoing
from serve_app.core.webhooks import delivery_id, queue_partition
from tests.support.receiver import Got, Receiver, drip, hang, receiver, status
from tests.support.webhooks import Hooks, running_hooks

SOON = (0.05, 0.05, 0.05)
TIMEOUT_S = 0.4


@pytest.fixture
async def hooks(valkey_url: str, tmp_path: Path) -> AsyncIterator[Hooks]:
    given = {"webhook_retry_s": SOON, "webhook_timeout_s": TIMEOUT_S}
    async with running_hooks(valkey_url, tmp_path, **given) as running:
        yield running


async def put(hooks: Hooks, webhook: dict[str, Any], number: int, body: bytes = b"{}") -> str:
    """A delivery straight into a webhook's queue, as the relay puts it."""
    count = hooks.api.services.settings.partitions
    partition = queue_partition(webhook["id"], count)
    assert partition is not None
    event = f"evt_{number}"
    an_id = delivery_id(webhook["id"], event)
    log = f"webhook:{webhook['id']}:default:{event}:workflow.completed"
    await hooks.api.services.webhooks._queue.accept(Outgoing(an_id, partition, log, body))
    return an_id


@pytest.mark.parametrize(
    ("answer", "word", "code"),
    [
        (status(500, b"sorry"), "answered 500", 500),
        (status(302, Location="http://127.0.0.1:9/"), "redirects are not followed", 302),
        (status(304), "answered 304", 304),
        (hang, "no complete answer", None),
        (drip, "no complete answer", None),
    ],
)
async def test_a_bad_answer_is_tried_again_until_none_is_left(
    hooks: Hooks, answer: Any, word: str, code: int | None
) -> None:
    await hooks.start_dispatcher()
    async with receiver(answer) as there:
        made = await hooks.create(there.url)
        await put(hooks, made, 1)
        (dead,) = await hooks.until(made["id"], "dead")
    assert [attempt["status"] for attempt in dead["attempts"]] == [code] * 4
    assert all(word in attempt["error"] for attempt in dead["attempts"])
    assert len({got.headers["webhook-id"] for got in there.got}) == 1


async def test_stopping_as_a_claim_comes_back_stops_cleanly(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url)
        running = await hooks.start_dispatcher()
        queue = running.dispatcher._queue
        claim, claimed, answer = queue.claim, asyncio.Event(), asyncio.Event()

        async def slow_claim(*given: Any) -> Any:
            batch = await claim(*given)
            if batch.deliveries:
                claimed.set()
                await answer.wait()
            return batch

        queue.claim = slow_claim  # type: ignore[method-assign]
        await put(hooks, made, 1)
        async with asyncio.timeout(5):
            await claimed.wait()
        running.task.cancel()
        answer.set()  # so the claim goes on in the turn in which the dispatcher ends
        with pytest.raises(asyncio.CancelledError):
            await running.task
        queue.claim = claim  # type: ignore[method-assign]
        await hooks.start_dispatcher()  # and what was claimed was given back
        await hooks.until(made["id"], "delivered")


async def test_nobody_listening_then_somebody(hooks: Hooks) -> None:
    await hooks.start_dispatcher(webhook_retry_s=(0.1,) * 50)
    async with receiver(status(200)) as there:
        port = there.port
        made = await hooks.create(there.url)
    await put(hooks, made, 1)
    (failed,) = await hooks.until(made["id"], "failed")
    assert failed["attempts"][0]["status"] is None
    assert failed["attempts"][0]["error"].startswith("no connection")
    assert failed["nextAttemptAt"]
    again = Receiver(status(200))
    server = await asyncio.start_server(again.serve, "127.0.0.1", port)
    (delivered,) = await hooks.until(made["id"], "delivered")
    server.close()
    assert delivered["attempts"][-1]["status"] == 200


async def test_ten_megabytes_of_answer_deliver_and_cost_a_few_bytes(hooks: Hooks) -> None:
    await hooks.start_dispatcher()
    async with receiver(status(200, b"x" * 10_000_000)) as there:
        made = await hooks.create(there.url)
        await put(hooks, made, 1)
        (delivered,) = await hooks.until(made["id"], "delivered")
    assert len(delivered["attempts"][0]["answer"]) == 512


async def test_a_name_that_now_leads_inside_is_not_followed(hooks: Hooks) -> None:
    """`localhost` stands for a name whose answer has changed to a refused address."""
    await hooks.start_dispatcher(egress_allow=())
    async with receiver(status(200)) as there:
        made = await hooks.create(f"http://localhost:{there.port}/")
        await put(hooks, made, 1)
        (dead,) = await hooks.until(made["id"], "dead")
    assert there.connections == 0
    assert "not permitted" in dead["attempts"][0]["error"]
    assert "127.0.0.1" not in str(dead)


async def test_retry_after_is_heeded(hooks: Hooks) -> None:
    await hooks.start_dispatcher()
    async with receiver(status(429, Retry_After="1")) as there:
        made = await hooks.create(there.url)
        began = time.monotonic()
        await put(hooks, made, 1)
        await hooks.got(there, 2)
    assert time.monotonic() - began >= 1


async def test_410_disables_the_endpoint_at_once(hooks: Hooks) -> None:
    await hooks.start_dispatcher()
    async with receiver(status(410)) as there:
        made = await hooks.create(there.url)
        await put(hooks, made, 1)
        await hooks.until(made["id"], "dead")
        async with asyncio.timeout(10):
            while (await _view(hooks, made))["enabled"]:
                await asyncio.sleep(0.01)
        view = await _view(hooks, made)
        assert "410" in view["disabledReason"]
        await put(hooks, made, 2)
        dead = await hooks.until(made["id"], "dead", 2)
        assert len(there.got) == 1
        assert "410" in dead[0]["attempts"][0]["error"]
        there.answer = status(200)
        path = f"/v1/webhooks/{made['id']}"
        enabled = (await hooks.api.http.patch(path, json={"enabled": True})).json()
        assert enabled["disabledReason"] is None
        await hooks.api.http.post(f"{path}/replay", json={"status": "dead"})
        await hooks.until(made["id"], "delivered", 2)


async def test_an_endpoint_that_only_fails_is_left_alone_for_a_while(hooks: Hooks) -> None:
    """Paused after ten failures in a row: what waits loses no try."""
    await hooks.start_dispatcher(webhook_retry_s=(60.0,))
    async with receiver(status(500)) as there:
        made = await hooks.create(there.url)
        for number in range(20):
            await put(hooks, made, number)
        failed = await hooks.until(made["id"], "failed", 10)
        waiting = await hooks.until(made["id"], "pending", 20 - len(failed))
        assert len(there.got) == len(failed) <= 12
        assert {len(one["attempts"]) for one in waiting} == {0}


async def test_an_endpoint_that_fails_for_days_is_disabled(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "HEALTHY_FAILURES", 1000)  # no pauses: they would take minutes
    await hooks.start_dispatcher(webhook_retry_s=(0.01,) * 30, webhook_disable_after_s=0)
    async with receiver(status(500)) as there:
        made = await hooks.create(there.url)
        for number in range(10):
            await put(hooks, made, number)
        async with asyncio.timeout(30):
            while (await _view(hooks, made))["enabled"]:
                await asyncio.sleep(0.02)
    assert "in a row" in (await _view(hooks, made))["disabledReason"]


async def test_a_flapping_endpoint_gets_everything(hooks: Hooks) -> None:
    await hooks.start_dispatcher(webhook_retry_s=(0.01,) * 60)
    turns = 0

    async def flap(got: Got, writer: asyncio.StreamWriter) -> None:
        nonlocal turns
        turns += 1
        await status(200 if turns % 4 else 503)(got, writer)

    async with receiver(flap) as there:
        made = await hooks.create(there.url)
        ids = {await put(hooks, made, number) for number in range(60)}
        delivered = await hooks.until(made["id"], "delivered", 60)
    assert {one["id"] for one in delivered} == ids
    assert {got.headers["webhook-id"] for got in there.got} == {f"evt_{n}" for n in range(60)}


async def test_one_endpoint_s_long_queue_holds_up_no_other(hooks: Hooks) -> None:
    """Its receiver hangs, and the dispatcher has little room: the healthy are served at once."""
    backlog = 2000
    async with AsyncExitStack() as stack:
        slow = await stack.enter_async_context(receiver(hang))
        slow_hook = await hooks.create(slow.url)
        await asyncio.gather(*(put(hooks, slow_hook, number) for number in range(backlog)))
        fast = await stack.enter_async_context(receiver(status(200)))
        healthy = [await hooks.create(f"{fast.url}?{number}") for number in range(20)]
        await hooks.start_dispatcher(webhook_inflight_max=8, webhook_timeout_s=30.0)
        await hooks.got(slow, 1)
        await asyncio.gather(*(put(hooks, hook, 0) for hook in healthy))
        await hooks.got(fast, 20)
        # A hanging endpoint that nobody knew got two at once, and no answer has come yet.
        assert len(slow.got) <= 2
    for hook in healthy:
        await hooks.until(hook["id"], "delivered")


async def test_many_hanging_endpoints_leave_room_once_they_have_failed(hooks: Hooks) -> None:
    async with receiver(hang) as slow, receiver(status(200)) as fast:
        ill = [await hooks.create(f"{slow.url}?{number}") for number in range(12)]
        for hook in ill:
            await asyncio.gather(*(put(hooks, hook, number) for number in range(20)))
        await hooks.start_dispatcher(webhook_inflight_max=8, webhook_retry_s=(60.0,))
        healthy = await hooks.create(fast.url)
        for number in range(10):
            await put(hooks, healthy, number)
        await hooks.until(healthy["id"], "delivered", 10)


async def test_a_full_queue_shows_what_it_did_not_take(hooks: Hooks) -> None:
    running = await hooks.start_dispatcher(webhook_backlog_max=3)
    await hooks.stop_dispatcher(running)  # its limits are known now
    made = await hooks.create("http://127.0.0.1:9/")
    for number in range(4):
        await put(hooks, made, number)
    (dead,) = await hooks.deliveries(made["id"], "?status=dead")
    assert "full" in dead["attempts"][0]["error"]
    assert dead["eventId"] == "evt_3"
    assert len(await hooks.deliveries(made["id"], "?status=pending")) == 3


async def test_the_same_message_twice_is_one_delivery(hooks: Hooks) -> None:
    await hooks.start_dispatcher()
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url)
        for _ in range(5):
            await put(hooks, made, 1)
        await hooks.until(made["id"], "delivered")
        await put(hooks, made, 1)
        await put(hooks, made, 2)
        await hooks.until(made["id"], "delivered", 2)
    assert [got.headers["webhook-id"] for got in there.got] == ["evt_1", "evt_2"]


async def test_a_dispatcher_killed_between_sending_and_recording_sends_again(
    hooks: Hooks,
) -> None:
    async with receiver(hang) as there:
        made = await hooks.create(there.url)
        first = await hooks.start_dispatcher(webhook_timeout_s=30.0)
        an_id = await put(hooks, made, 1)
        await hooks.got(there, 1)
        await hooks.kill_dispatcher(first)
        there.answer = status(200)
        await hooks.start_dispatcher()
        (delivered,) = await hooks.until(made["id"], "delivered")
    assert delivered["id"] == an_id
    assert [got.headers["webhook-id"] for got in there.got] == ["evt_1", "evt_1"]
    assert len(delivered["attempts"]) == 1


async def test_a_dispatcher_that_stops_gives_back_at_once(hooks: Hooks) -> None:
    async with receiver(hang) as there:
        made = await hooks.create(there.url)
        first = await hooks.start_dispatcher(webhook_timeout_s=30.0, webhook_lease_ms=600_000)
        await put(hooks, made, 1)
        await hooks.got(there, 1)
        await hooks.stop_dispatcher(first)
        there.answer = status(200)
        await hooks.start_dispatcher()
        await hooks.until(made["id"], "delivered")


async def test_a_late_record_of_a_lost_lease_changes_nothing(hooks: Hooks) -> None:
    """Its lease ran out while it was slow; another sends it meanwhile and fails."""
    answers = iter([200, 500, 500, 500, 500])
    release = asyncio.Event()

    async def answer(got: Got, writer: asyncio.StreamWriter) -> None:
        code = next(answers)
        if code == 200:
            await release.wait()
        await status(code)(got, writer)

    async with receiver(answer) as there:
        made = await hooks.create(there.url)
        slow = await hooks.start_dispatcher(webhook_timeout_s=30.0)
        await put(hooks, made, 1)
        await hooks.got(there, 1)
        queue = hooks.api.services.webhooks._queue
        for partition in range(queue.partition_count):
            await queue.release(partition, slow.dispatcher.dispatcher_id)  # as a reaper does
        await hooks.until(made["id"], "dead")
        release.set()
        async with asyncio.timeout(10):
            while slow.dispatcher.flying:
                await asyncio.sleep(0.01)
        assert [one["status"] for one in await hooks.deliveries(made["id"])] == ["dead"]


async def test_two_dispatchers_share_and_none_is_sent_twice(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        made = [await hooks.create(f"{there.url}?{number}") for number in range(4)]
        for _ in range(2):
            await hooks.start_dispatcher()
        for hook in made:
            await asyncio.gather(*(put(hooks, hook, number) for number in range(50)))
        for hook in made:
            await hooks.until(hook["id"], "delivered", 50)
    assert len(there.got) == 200


async def test_nothing_is_lost_while_the_store_is_away(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "store", SystemClock(), SystemEntropy())
    await server.start()
    given = {"webhook_retry_s": (0.05,) * 20}
    async with (
        running_hooks(server.url, tmp_path, **given) as hooks,
        receiver(status(200)) as there,
    ):
        made = await hooks.create(there.url)
        await hooks.start_dispatcher()
        for number in range(100):
            await put(hooks, made, number)
            if number == 50:
                await hooks.got(there, 20)
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                await server.wait()
                await server.start()
        await hooks.until(made["id"], "delivered", 100)
    await server.stop()
    assert {got.headers["webhook-id"] for got in there.got} == {f"evt_{n}" for n in range(100)}


async def _view(hooks: Hooks, webhook: dict[str, Any]) -> dict[str, Any]:
    return dict((await hooks.api.http.get(f"/v1/webhooks/{webhook['id']}")).json())


async def test_a_secret_that_cannot_be_read_is_told_in_the_attempt(hooks: Hooks) -> None:
    """The operator has changed the cluster secret: nothing is sent unsigned."""
    await hooks.start_dispatcher(cluster_secret=SecretStr("another secret"))
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url)
        await put(hooks, made, 1)
        (dead,) = await hooks.until(made["id"], "dead")
    assert there.got == []
    assert "INFERPIPE_CLUSTER_SECRET" in dead["attempts"][0]["error"]

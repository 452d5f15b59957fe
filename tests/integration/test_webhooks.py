"""Webhooks as their owner sees them: the API, an executor, a dispatcher, receivers on loopback."""

import asyncio
import hashlib
import hmac
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from inferpipe.webhooks import verify
from tests.support.receiver import receiver, status
from tests.support.webhooks import Hooks, running_hooks

EVENTS = ["workflow.completed"]
GUIDE = Path(__file__).parents[1] / "support" / "guide_verifier.js"


@pytest.fixture
async def hooks(valkey_url: str, tmp_path: Path) -> AsyncIterator[Hooks]:
    async with running_hooks(valkey_url, tmp_path, webhooks_max=4) as running:
        await running.start_dispatcher()
        yield running


@pytest.fixture
async def quiet(valkey_url: str, tmp_path: Path) -> AsyncIterator[Hooks]:
    """Without a dispatcher: nothing is sent."""
    async with running_hooks(valkey_url, tmp_path, webhooks_max=4) as running:
        yield running


async def refused(hooks: Hooks, **body: object) -> tuple[int, str]:
    whole = {"url": "http://127.0.0.1:9/", "events": ["*"], **body}
    answer = await hooks.api.http.post("/v1/webhooks", json=whole)
    return answer.status_code, answer.json()["code"]


async def test_an_end_is_told_signed_in_both_schemes(hooks: Hooks) -> None:
    async with receiver(status(204)) as there:
        made = await hooks.create(there.url, headers={"X-Tenant": "t1"})
        execution_id = await hooks.execute(answer=42)
        await hooks.got(there, 1)
        delivered = await hooks.until(made["id"], "delivered")
    got = there.got[0]
    event = json.loads(got.body)
    assert event["type"] == "workflow.completed"
    assert event["data"] == {
        "executionId": execution_id,
        "workflowId": "test-echo",
        "output": {"answer": 42},
        "error": None,
        "metadata": {},
        "usage": {"promptTokens": 0, "completionTokens": 0, "totalTokens": 0},
    }
    assert got.headers["webhook-id"] == event["id"] == delivered[0]["eventId"]
    assert got.headers["x-tenant"] == "t1"
    assert got.headers["content-type"] == "application/json"
    assert Verifier(made["secret"]).verify(got.body, got.headers) == event
    mac = hmac.new(made["secret"].encode(), got.body, hashlib.sha256).hexdigest()
    assert got.headers["x-inferpipe-signature"] == mac
    assert [a["status"] for a in delivered[0]["attempts"]] == [204]
    assert delivered[0]["nextAttemptAt"] is None


async def test_a_webhook_made_just_before_an_execution_hears_of_it(hooks: Hooks) -> None:
    """However fresh: what executors remember of webhooks is never older than the execution."""
    async with receiver(status(200)) as there:
        for number in range(20):
            made = await hooks.create(f"{there.url}?{number}")
            await hooks.execute(n=number)
            await hooks.got(there, number + 1)
            assert there.got[-1].path.endswith(f"?{number}")
            await hooks.until(made["id"], "delivered")
            await hooks.api.http.delete(f"/v1/webhooks/{made['id']}")


async def test_each_mode_is_heard_by_those_who_ask_for_it(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        default = await hooks.create(f"{there.url}?default", events=EVENTS)
        both = await hooks.create(f"{there.url}?both", events=EVENTS, modes=["sync", "stream"])
        ids = [await hooks.execute(mode) for mode in ("/async", "", "/stream")]
        await hooks.until(both["id"], "delivered", 2)
        await hooks.until(default["id"], "delivered", 1)
        heard = {
            (got.path.partition("?")[2], json.loads(got.body)["data"]["executionId"])
            for got in there.got
        }
    assert heard == {("default", ids[0]), ("both", ids[1]), ("both", ids[2])}
    assert len(there.got) == 3


async def test_the_event_of_one_end_has_one_id_at_all_endpoints(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        for number in range(3):
            await hooks.create(f"{there.url}?{number}")
        await hooks.execute()
        await hooks.got(there, 3)
    assert len({got.headers["webhook-id"] for got in there.got}) == 1
    assert len({got.body for got in there.got}) == 1
    assert len({got.headers["webhook-signature"] for got in there.got}) == 3


async def test_failures_and_cancels_are_told_and_filters_hold(hooks: Hooks) -> None:
    fails = {"id": "fails", "steps": [{"id": "x", "transform": "{{ input.missing.deep }}"}]}
    made = await hooks.api.http.put("/v1/workflows/fails", json=fails)
    assert made.status_code == 201, made.text
    async with receiver(status(200)) as there:
        failures = await hooks.create(there.url, events=["workflow.failed"])
        other = await hooks.create(f"{there.url}?other", workflowId="another")
        await hooks.execute()
        answer = await hooks.api.http.post(
            "/v1/execute/async", json={"workflowId": "fails", "input": {}, "metadata": {"a": 1}}
        )
        await hooks.until(failures["id"], "delivered")
        assert await hooks.deliveries(other["id"]) == []
    (got,) = there.got
    event = json.loads(got.body)
    assert event["type"] == "workflow.failed"
    assert event["data"]["executionId"] == answer.json()["id"]
    assert event["data"]["output"] is None
    assert event["data"]["error"]
    assert event["data"]["metadata"] == {"a": 1}


async def test_a_secret_is_shown_once_and_stored_sealed(quiet: Hooks, valkey_url: str) -> None:
    made = await quiet.create("http://127.0.0.1:9/", headers={"Authorization": "Bearer topsecret"})
    secret = made["secret"]
    texts = [
        (await quiet.api.http.get("/v1/webhooks")).text,
        (await quiet.api.http.get(f"/v1/webhooks/{made['id']}")).text,
        (await quiet.api.http.patch(f"/v1/webhooks/{made['id']}", json={})).text,
    ]
    assert not any("whsec_" in text for text in texts)
    client = Redis.from_url(valkey_url)
    stored = b"".join((await client.hgetall("ip:{config}:hooks:default")).values())
    await client.aclose()
    assert secret[6:].encode() not in stored
    assert b"topsecret" not in stored
    reader = await quiet.api.new_key("read")
    shown = (await quiet.api.http.get("/v1/webhooks", headers=reader)).json()["items"][0]
    assert shown["headers"] == {"authorization": "…"}


async def test_a_rotation_signs_with_both_for_its_overlap(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url)
        answer = await hooks.api.http.post(
            f"/v1/webhooks/{made['id']}/rotate-secret", json={"overlap": 60_000}
        )
        assert answer.status_code == 200
        new = answer.json()["secret"]
        assert new.startswith("whsec_")
        await asyncio.sleep(1.1)  # what a dispatcher remembers of webhooks lasts for a second
        await hooks.execute()
        await hooks.got(there, 1)
        got = there.got[0]
        for secret in (made["secret"], new):
            Verifier(secret).verify(got.body, got.headers)
        old_mac = hmac.new(made["secret"].encode(), got.body, hashlib.sha256).hexdigest()
        assert got.headers["x-inferpipe-signature"] == old_mac
        await hooks.api.http.post(f"/v1/webhooks/{made['id']}/rotate-secret", json={"overlap": 0})
        await asyncio.sleep(1.1)
        await hooks.execute()
        await hooks.got(there, 2)
        assert there.got[1].headers["webhook-signature"].count("v1,") == 1


async def test_one_that_cannot_be_read_hides_no_other_and_can_be_rotated(hooks: Hooks) -> None:
    """Its secret was sealed before `INFERPIPE_CLUSTER_SECRET` changed."""
    async with receiver(status(204)) as there:
        lost = await hooks.create(there.url, headers={"x-team": "a"})
        kept = await hooks.create(there.url, events=["workflow.failed"])
        store = hooks.api.services.webhooks._store
        [stored] = [one for one in await store.all("default") if one.id == lost["id"]]
        assert await store.put(replace(stored, sealed=stored.sealed[:-8] + "AAAAAAAA"), 64)
        listed = (await hooks.api.http.get("/v1/webhooks")).json()["items"]
        assert {one["id"]: one["isReadable"] for one in listed} == {
            lost["id"]: False,
            kept["id"]: True,
        }
        place = f"/v1/webhooks/{lost['id']}"
        assert (await hooks.api.http.get(place)).json()["headers"] == {}
        refused = await hooks.api.http.patch(place, json={"headers": {"x-team": "b"}})
        assert (refused.status_code, "rotate" in refused.text) == (422, True)
        changed = await hooks.api.http.patch(place, json={"description": "still here"})
        assert (changed.status_code, changed.json()["isReadable"]) == (200, False)
        rotated = await hooks.api.http.post(f"{place}/rotate-secret", json={})
        assert rotated.status_code == 200, rotated.text
        assert (await hooks.api.http.get(place)).json()["isReadable"] is True
        await hooks.execute()
        await hooks.got(there, 1)
        verify(there.got[0].body, there.got[0].headers, rotated.json()["secret"])
        assert (await hooks.api.http.delete(place)).status_code == 204


async def test_what_cannot_be_is_refused_at_once(quiet: Hooks) -> None:
    assert await refused(quiet, url="http://127.0.0.2/") == (422, "EGRESS_REFUSED")
    assert await refused(quiet, url="http://[::1]/") == (422, "EGRESS_REFUSED")
    assert await refused(quiet, url="http://2130706433/") == (422, "EGRESS_REFUSED")
    assert await refused(quiet, url="http://169.254.169.254/latest") == (422, "EGRESS_REFUSED")
    assert await refused(quiet, url="ftp://example.com/") == (422, "EGRESS_REFUSED")
    assert await refused(quiet, url="http://a:b@example.com/") == (422, "EGRESS_REFUSED")
    assert await refused(quiet, events=["workflow.done"]) == (422, "INVALID_REQUEST")
    assert await refused(quiet, events=[]) == (422, "INVALID_REQUEST")
    assert await refused(quiet, modes=["batch"]) == (422, "INVALID_REQUEST")
    assert await refused(quiet, headers={"Host": "x"}) == (422, "INVALID_REQUEST")
    assert await refused(quiet, headers={"X": "a\r\nb"}) == (422, "INVALID_REQUEST")
    assert await refused(quiet, typo=1) == (422, "INVALID_REQUEST")
    made = await quiet.create("http://localhost:9/")  # a name is judged when it is connected to
    patched = await quiet.api.http.patch(
        f"/v1/webhooks/{made['id']}", json={"url": "http://10.0.0.1/"}
    )
    assert (patched.status_code, patched.json()["code"]) == (422, "EGRESS_REFUSED")


async def test_a_workspace_has_a_bound_on_its_webhooks(quiet: Hooks) -> None:
    made = [await quiet.create("http://127.0.0.1:9/") for _ in range(4)]
    assert await refused(quiet) == (409, "TOO_MANY_WEBHOOKS")
    await quiet.api.http.delete(f"/v1/webhooks/{made[0]['id']}")
    await quiet.create("http://127.0.0.1:9/")


async def test_a_change_leaves_what_it_does_not_name(quiet: Hooks) -> None:
    made = await quiet.create(
        "http://127.0.0.1:9/", workflowId="w", description="d", headers={"a": "b"}
    )
    path = f"/v1/webhooks/{made['id']}"
    changed = (await quiet.api.http.patch(path, json={"description": None})).json()
    assert changed == {**changed, "workflowId": "w", "description": None, "headers": {"a": "b"}}
    changed = (await quiet.api.http.patch(path, json={"workflowId": None, "headers": None})).json()
    assert (changed["workflowId"], changed["headers"]) == (None, {})
    changed = (await quiet.api.http.patch(path, json={"enabled": False})).json()
    assert (changed["enabled"], changed["events"]) == (False, ["*"])
    assert (await quiet.api.http.get(path)).json() == changed


async def test_changes_at_the_same_time_are_all_in(quiet: Hooks) -> None:
    made = await quiet.create("http://127.0.0.1:9/")
    path = f"/v1/webhooks/{made['id']}"
    bodies: list[dict[str, Any]] = [
        {"description": "d"},
        {"workflowId": "w"},
        {"headers": {"a": "b"}},
        {"events": EVENTS},
    ]
    await asyncio.gather(*(quiet.api.http.patch(path, json=body) for body in bodies))
    final = (await quiet.api.http.get(path)).json()
    for body in bodies:
        assert final.items() >= body.items()


async def test_a_test_event_is_sent_whatever_the_filter(hooks: Hooks) -> None:
    async with receiver(status(200, b"thanks")) as there:
        made = await hooks.create(
            there.url, events=["workflow.failed"], workflowId="other", enabled=False
        )
        answer = await hooks.api.http.post(f"/v1/webhooks/{made['id']}/test")
        assert answer.status_code == 202
        await hooks.got(there, 1)
        (delivered,) = await hooks.until(made["id"], "delivered")
    assert json.loads(there.got[0].body)["type"] == "webhook.test"
    assert delivered["id"] == answer.json()["id"]
    assert delivered["attempts"][0]["answer"] == "thanks"


async def test_a_disabled_webhook_hears_nothing_and_can_be_enabled_again(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url, enabled=False)
        path = f"/v1/webhooks/{made['id']}"
        await hooks.execute("")
        await hooks.execute()
        await hooks.api.http.patch(path, json={"enabled": True})
        last = await hooks.execute(last=True)
        await hooks.got(there, 1)
        assert len(await hooks.deliveries(made["id"])) == 1
    assert json.loads(there.got[0].body)["data"]["executionId"] == last


async def test_deliveries_are_paged_newest_first(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url)
        for number in range(7):
            await hooks.execute(n=number)
        await hooks.until(made["id"], "delivered", 7)
        path, seen, cursor, pages = f"/v1/webhooks/{made['id']}/deliveries", [], "", 0
        while True:
            page = (await hooks.api.http.get(f"{path}?limit=3{cursor}")).json()
            seen += page["items"]
            pages += 1
            if page["nextCursor"] is None:
                break
            cursor = f"&cursor={page['nextCursor']}"
    assert len({one["id"] for one in seen}) == len(seen) == 7
    assert [one["createdAt"] for one in seen] == sorted(
        (one["createdAt"] for one in seen), reverse=True
    )
    assert pages in (3, 4)
    one = (await hooks.api.http.get(f"/v1/deliveries/{seen[0]['id']}")).json()
    assert one == seen[0]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("status=done", 422),
        ("limit=0", 422),
        ("limit=201", 422),
        ("limit=x", 422),
        ("cursor=x", 400),
        ("cursor=1.", 400),
    ],
)
async def test_a_query_that_is_none_is_refused(quiet: Hooks, query: str, code: int) -> None:
    made = await quiet.create("http://127.0.0.1:9/")
    got = await quiet.api.http.get(f"/v1/webhooks/{made['id']}/deliveries?{query}")
    assert got.status_code == code


async def test_a_replay_sends_the_same_event_again(hooks: Hooks) -> None:
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url)
        await hooks.execute()
        (first,) = await hooks.until(made["id"], "delivered")
        answer = await hooks.api.http.post(f"/v1/deliveries/{first['id']}/replay")
        assert answer.status_code == 202
        await hooks.got(there, 2)
        async with asyncio.timeout(10):
            while len((await hooks.until(made["id"], "delivered"))[0]["attempts"]) < 2:
                await asyncio.sleep(0.01)
    assert there.got[0].body == there.got[1].body
    assert there.got[0].headers["webhook-id"] == there.got[1].headers["webhook-id"]
    Verifier(made["secret"]).verify(there.got[1].body, there.got[1].headers)


async def test_all_that_died_is_replayed_by_status_and_time(
    valkey_url: str, tmp_path: Path
) -> None:
    async with running_hooks(valkey_url, tmp_path, webhook_retry_s=(0.05,)) as hooks:
        await hooks.start_dispatcher()
        async with receiver(status(500)) as there:
            made = await hooks.create(there.url)
            for number in range(2):
                await hooks.execute(n=number)
            dead = await hooks.until(made["id"], "dead", 2)
            assert {len(one["attempts"]) for one in dead} == {2}
            there.answer = status(200)
            path = f"/v1/webhooks/{made['id']}/replay"
            early = {"status": "dead", "to": "2020-01-01T00:00:00Z"}
            none = (await hooks.api.http.post(path, json=early)).json()
            assert none == {"replayed": 0, "isComplete": True}
            again = (await hooks.api.http.post(path, json={"status": "dead"})).json()
            assert again == {"replayed": 2, "isComplete": True}
            delivered = await hooks.until(made["id"], "delivered", 2)
            assert {len(one["attempts"]) for one in delivered} == {3}
            whole = {"from": "2020-01-01T00:00:00+02:00"}
            assert (await hooks.api.http.post(path, json=whole)).json()["replayed"] == 2


async def test_a_deleted_webhook_leaves_nothing_behind(quiet: Hooks, valkey_url: str) -> None:
    made = await quiet.create("http://127.0.0.1:9/")
    await quiet.execute()
    await quiet.until(made["id"], "pending")
    path = f"/v1/webhooks/{made['id']}"
    assert (await quiet.api.http.delete(path)).status_code == 204
    assert (await quiet.api.http.delete(path)).status_code == 404
    assert (await quiet.api.http.get(f"{path}/deliveries")).status_code == 404
    client = Redis.from_url(valkey_url)
    left = [key async for key in client.scan_iter("ip:*:d[lxqh]:*")]
    await client.aclose()
    assert left == []


async def test_another_workspace_s_webhooks_and_deliveries_are_unknown(hooks: Hooks) -> None:
    other = await hooks.api.new_workspace("other")
    async with receiver(status(200)) as there:
        made = await hooks.create(there.url)
        await hooks.execute()
        (delivery,) = await hooks.until(made["id"], "delivered")
    http, path = hooks.api.http, f"/v1/webhooks/{made['id']}"
    answers = [
        await http.get(path, headers=other),
        await http.patch(path, headers=other, json={}),
        await http.delete(path, headers=other),
        await http.post(f"{path}/test", headers=other),
        await http.post(f"{path}/rotate-secret", headers=other, json={}),
        await http.get(f"{path}/deliveries", headers=other),
        await http.post(f"{path}/replay", headers=other, json={}),
        await http.get(f"/v1/deliveries/{delivery['id']}", headers=other),
        await http.post(f"/v1/deliveries/{delivery['id']}/replay", headers=other),
        await http.get("/v1/deliveries/dlv_zz"),
        await http.get("/v1/deliveries/x"),
    ]
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert (await http.get("/v1/webhooks", headers=other)).json()["items"] == []


async def test_only_admins_configure_and_readers_look(quiet: Hooks) -> None:
    made = await quiet.create("http://127.0.0.1:9/")
    path, http = f"/v1/webhooks/{made['id']}", quiet.api.http
    execute = await quiet.api.new_key("execute")
    assert (await http.get(path, headers=execute)).status_code == 200
    body = {"url": "http://127.0.0.1:9/", "events": ["*"]}
    answers = [
        await http.post("/v1/webhooks", headers=execute, json=body),
        await http.patch(path, headers=execute, json={}),
        await http.delete(path, headers=execute),
        await http.post(f"{path}/test", headers=execute),
        await http.post(f"{path}/rotate-secret", headers=execute),
        await http.post(f"{path}/replay", headers=execute),
        await http.post("/v1/deliveries/dlv_00x/replay", headers=execute),
    ]
    assert [answer.status_code for answer in answers] == [403] * len(answers)


async def test_a_repeated_creation_makes_one_and_shows_no_secret_again(quiet: Hooks) -> None:
    body = {"url": "http://127.0.0.1:9/", "events": ["*"]}
    key = {"Idempotency-Key": "once"}
    first, second = [
        await quiet.api.http.post("/v1/webhooks", json=body, headers=key) for _ in range(2)
    ]
    assert first.json()["id"] == second.json()["id"]
    assert "secret" not in second.json()
    assert second.json()["secretShown"] is True
    assert len((await quiet.api.http.get("/v1/webhooks")).json()["items"]) == 1


async def test_a_large_output_is_left_to_be_fetched(valkey_url: str, tmp_path: Path) -> None:
    async with running_hooks(valkey_url, tmp_path) as hooks, receiver(status(200)) as there:
        await hooks.start_dispatcher()
        await hooks.create(there.url)
        execution_id = await hooks.execute(text="x" * 300_000)
        await hooks.got(there, 1)
    data = json.loads(there.got[0].body)["data"]
    assert data["output"] is None
    assert data["outputUrl"] == f"http://127.0.0.1:8000/v1/executions/{execution_id}"


async def test_all_of_it_works_on_a_cluster(cluster_url: str, tmp_path: Path) -> None:
    async with running_hooks(cluster_url, tmp_path, webhook_retry_s=(0.05,)) as hooks:
        await hooks.start_dispatcher()
        async with receiver(status(500)) as there:
            made = [await hooks.create(f"{there.url}?{number}") for number in range(6)]
            await hooks.execute()
            for hook in made:
                await hooks.until(hook["id"], "dead")
            there.answer = status(200)
            for hook in made:
                await hooks.api.http.post(f"/v1/webhooks/{hook['id']}/replay")
                await hooks.until(hook["id"], "delivered")
                await hooks.api.http.delete(f"/v1/webhooks/{hook['id']}")


async def test_independent_verifiers_accept_ours_and_nothing_else(hooks: Hooks) -> None:
    """The standardwebhooks package, the usage guide's own code in Node, and our SDK."""
    async with receiver(status(200)) as there:
        made, other = [await hooks.create(f"{there.url}?{number}") for number in range(2)]
        await hooks.execute(text="naïve 𝄞")
        await hooks.got(there, 2)
    got = next(one for one in there.got if one.path.endswith("?0"))
    changed = got.body.replace(b"completed", b"completee")
    assert changed != got.body
    secret, wrong = made["secret"], other["secret"]
    stale = {**got.headers, "webhook-timestamp": str(int(got.headers["webhook-timestamp"]) - 600)}
    event = Verifier(secret).verify(got.body, got.headers)
    assert event["data"]["output"] == {"text": "naïve 𝄞"}
    assert verify(got.body, got.headers, secret).id == event["id"]
    for key, body, headers in (
        (wrong, got.body, got.headers),
        (secret, changed, got.headers),
        (secret, got.body, stale),
    ):
        with pytest.raises(WebhookVerificationError):
            Verifier(key).verify(body, headers)
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here: the usage guide's own verifier was not run")
    signature = got.headers["x-inferpipe-signature"]
    cases = [
        {"payload": body.decode(), "signature": signature, "secret": key}
        for body, key in ((got.body, secret), (changed, secret), (got.body, wrong))
    ]
    run = await asyncio.create_subprocess_exec(
        node, str(GUIDE), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await run.communicate(json.dumps(cases).encode())
    assert json.loads(output) == [True, False, False]

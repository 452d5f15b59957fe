"""Webhooks that come in: signed, once, and telling a stranger nothing."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from standardwebhooks import Webhook

from serve_app.core.auth import Scope
from tests.integration.test_events import define, send, started
from tests.support.api import Api, running_api

STANDARD = "triggers: [{webhook: standard}]\nsteps: [{id: a, transform: '{{ [input, event] }}'}]"
GITHUB = STANDARD.replace("standard}", "github, if: event.data.action == 'opened'}")


@pytest.fixture
async def api(store_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(store_url, tmp_path) as running:
        yield running


async def secret_of(api: Api, workflow_id: str, **body: object) -> str:
    made = await api.http.post(f"/v1/workflows/{workflow_id}/hook", json=body)
    assert made.status_code == 201, made.text
    assert made.json()["url"].endswith(f"/hooks/default/{workflow_id}")
    return str(made.json()["secret"])


def signed(secret: str, body: bytes, an_id: str = "msg_1", late_s: float = 0) -> dict[str, str]:
    """By somebody else's implementation of Standard Webhooks."""
    at = datetime.now(UTC) - timedelta(seconds=late_s)
    return {
        "webhook-id": an_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(an_id, at, body.decode()),
    }


def by_github(secret: str, body: bytes, delivery: str = "d1") -> dict[str, str]:
    digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {"X-Hub-Signature-256": f"sha256={digest}", "X-GitHub-Delivery": delivery}


async def deliver(
    api: Api, name: str, body: bytes, headers: dict[str, str], workspace: str = "default"
) -> httpx.Response:
    path = f"/hooks/{workspace}/{name}"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = api.http.build_request("POST", path, content=body, headers=raw)
    del request.headers["Authorization"]
    return await api.http.send(request)


async def test_a_signed_webhook_starts_its_workflow_with_its_body(api: Api) -> None:
    await define(api, "hook", STANDARD)
    await define(api, "nosy", "triggers: [{event: '*'}]\nsteps: [{id: a, echo: {}}]")
    secret, body = await secret_of(api, "hook"), b'{"action": "paid", "n": 1}'
    answer = await deliver(api, "hook", body, signed(secret, body))
    assert answer.status_code == 202, answer.text
    (record,) = await started(api, "hook")
    given, event = record["data"]
    assert given == event["data"] == {"action": "paid", "n": 1}
    assert event["id"] == answer.json()["id"] == record["trigger"]["id"]
    assert record["trigger"]["type"] == "webhook"
    assert await started(api, "nosy") == []


async def test_a_repeat_starts_nothing_again(api: Api) -> None:
    await define(api, "hook", STANDARD)
    secret, body = await secret_of(api, "hook"), b"{}"
    answers = await asyncio.gather(
        *(deliver(api, "hook", body, signed(secret, body, late_s=n)) for n in range(5))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    await deliver(api, "hook", body, signed(secret, body, "msg_2"))
    assert len(await started(api, "hook")) == 2


async def test_githubs_scheme_signs_the_body_and_so_it_tells_the_repeat(api: Api) -> None:
    await define(api, "hook", GITHUB)
    secret = await secret_of(api, "hook", secret="what-I-gave-to-the-forge")
    assert secret == "what-I-gave-to-the-forge"
    opened = json.dumps({"action": "opened", "number": 7}).encode()
    for delivery in ("d1", "d1", "replayed-by-a-listener"):
        answer = await deliver(api, "hook", opened, by_github(secret, opened, delivery))
        assert answer.status_code == 202
    closed = json.dumps({"action": "closed", "number": 7}).encode()
    assert (await deliver(api, "hook", closed, by_github(secret, closed))).status_code == 202
    (record,) = await started(api, "hook")
    assert record["data"][0] == {"action": "opened", "number": 7}


async def test_what_is_wrong_is_refused_and_never_told_apart(api: Api) -> None:
    await define(api, "hook", STANDARD)
    await define(api, "plain", "steps: [{id: a, echo: {}}]")
    await define(api, "mute", STANDARD)
    body = b'{"n": 1}'
    secret, plain = await secret_of(api, "hook"), await secret_of(api, "plain")
    right = signed(secret, body)
    other = "whsec_" + "A" * 32
    wrong: list[tuple[str, bytes, dict[str, str]]] = [
        ("hook", body, {}),
        ("hook", b'{"n": 2}', right),
        ("hook", body, signed(other, body)),
        ("hook", body, {**right, "webhook-id": "msg_9"}),
        ("hook", body, {**right, "webhook-id": ""}),
        ("hook", body, {**right, "webhook-timestamp": "0"}),
        ("hook", body, {**right, "webhook-timestamp": "-1"}),
        ("hook", body, {**right, "webhook-timestamp": "9" * 400}),
        ("hook", body, {**right, "webhook-timestamp": "²"}),
        ("hook", body, signed(secret, body, late_s=302)),
        ("hook", body, signed(secret, body, late_s=-302)),
        ("hook", body, {**right, "webhook-signature": "v1,"}),
        ("hook", body, {**right, "webhook-signature": "v1a," + "A" * 44}),
        ("hook", body, {**right, "webhook-signature": "v1,é " * 50}),
        ("hook", body, by_github(secret, body)),  # not its scheme
        ("plain", body, signed(plain, body)),  # it has no such trigger
        ("mute", body, signed(other, body)),  # it has no secret
        ("unknown", body, signed(secret, body)),
    ]
    said = set()
    for name, sent_body, headers in wrong:
        answer = await deliver(api, name, sent_body, headers)
        assert answer.status_code == 401, (name, headers, answer.text)
        said.add(answer.json()["detail"])
    assert len(said) == 1
    assert (await deliver(api, "hook", body, right, "elsewhere")).status_code == 401
    assert await started(api, "hook") == []
    assert (await deliver(api, "hook", body, right)).status_code == 202


async def test_a_hostile_body_is_refused_when_it_is_signed_too(api: Api) -> None:
    await define(api, "hook", STANDARD)
    secret = await secret_of(api, "hook")
    for index, body in enumerate((b"", b"{", b"[" * 80 + b"]" * 80, b"\xff", b'{"a": NaN}')):
        headers = by_standard(secret, body, f"m{index}")
        answer = await deliver(api, "hook", body, headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "MALFORMED_JSON"), body
    large = await deliver(api, "hook", b'"' + b"x" * 262_144 + b'"', {})
    assert large.status_code == 413
    assert await started(api, "hook") == []


def by_standard(secret: str, body: bytes, an_id: str) -> dict[str, str]:
    """Over bytes that are no text."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    at = str(int(datetime.now(UTC).timestamp()))
    mac = hmac.new(key, f"{an_id}.{at}.".encode() + body, hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(mac).decode()
    return {"webhook-id": an_id, "webhook-timestamp": at, "webhook-signature": signature}


async def test_a_secret_rotates_with_an_overlap_and_can_be_taken_away(api: Api) -> None:
    await define(api, "hook", STANDARD)
    first = await secret_of(api, "hook")
    second = await secret_of(api, "hook")
    statuses = [
        (await deliver(api, "hook", b"{}", signed(one, b"{}", f"a{one}"))).status_code
        for one in (first, second)
    ]
    assert statuses == [202, 202]
    third = await secret_of(api, "hook", overlap=0)
    statuses = [
        (await deliver(api, "hook", b"{}", signed(one, b"{}", f"b{one}"))).status_code
        for one in (first, second, third)
    ]
    assert statuses == [401, 401, 202]
    assert (await api.http.delete("/v1/workflows/hook/hook")).status_code == 204
    gone = await deliver(api, "hook", b"{}", signed(third, b"{}", "c"))
    assert gone.status_code == 401
    assert (await api.http.delete("/v1/workflows/hook/hook")).status_code == 404


async def test_secrets_are_sealed_shown_once_and_an_admins(api: Api) -> None:
    await define(api, "hook", STANDARD)
    headers = {"Idempotency-Key": "k"}
    first = await api.http.post("/v1/workflows/hook/hook", headers=headers)
    again = await api.http.post("/v1/workflows/hook/hook", headers=headers)
    secret = first.json()["secret"]
    assert again.json()["secretShown"] is True
    assert secret not in again.text
    assert secret not in (await api.http.get("/v1/workflows/hook")).text
    calls = api.services.executions._store._calls
    stored = await calls.call("HGET", "ip:{config}:in:default", "hook")
    assert secret.encode() not in stored
    for wrong in ({"secret": "short"}, {"secret": "whsec_???????????"}, {"overlap": -1}, {"x": 1}):
        refused = await api.http.post("/v1/workflows/hook/hook", json=wrong)
        assert refused.status_code == 422, wrong
    for scope in (Scope.READ, Scope.EXECUTE):
        key = await api.new_key(scope)
        answer = await api.http.post("/v1/workflows/hook/hook", headers=key)
        assert answer.status_code == 403
    other = await api.new_workspace("second")
    assert (await api.http.post("/v1/workflows/hook/hook", headers=other)).status_code == 404


async def test_nobody_can_send_a_hooks_event_otherwise(api: Api) -> None:
    await define(api, "hook", STANDARD)
    answer = await send(api, {"name": "inferpipe/hook.hook", "data": {}})
    assert answer.status_code == 422
    put = await api.http.put(
        "/v1/workflows/forger",
        json={"steps": [{"id": "e", "emit": {"name": "inferpipe/hook.hook"}}]},
    )
    assert put.status_code == 422
    step = {"id": "e", "emit": {"name": "{{ input.name }}"}}
    await api.http.put("/v1/workflows/forger", json={"steps": [step]})
    body = {"workflowId": "forger", "input": {"name": "inferpipe/hook.hook"}}
    assert (await api.http.post("/v1/execute", json=body)).json()["status"] == "failed"
    assert await started(api, "hook") == []

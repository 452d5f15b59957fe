"""The `http` step over a real connection, and what `publish` and `emit` leave in the journal."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.adapters.redis_store import partition_key
from serve_app.core.app_events import topic_partition
from tests.support.api import Api, running_api
from tests.support.receiver import receiver

CALL = """
steps:
  - id: call
    http: {method: POST, url: "%s", json: {q: "{{ input.q }}"}, headers: {X-Own: yes!}, timeout: 2s}
    retry: {attempts: 2, backoff: fixed, maxDelay: 20ms}
"""


def answering(*answers: bytes) -> Any:
    """Each request gets the next answer, the last one for ever."""
    left = list(answers)

    async def answer(got: object, writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return answer


def reply(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


GOOD = reply("200 OK", b'{"ok": true}', "Content-Type: application/json")


@pytest.fixture
async def api(valkey_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(
        valkey_url, tmp_path, egress_allow=("127.0.0.1/32",), http_answer_max_bytes=2048
    ) as running:
        yield running


async def run(api: Api, definition: str) -> dict[str, Any]:
    put = await api.http.put("/v1/workflows/call", json=yaml.safe_load(definition))
    assert put.status_code in (200, 201), put.text
    body = {"workflowId": "call", "input": {"q": "é"}}
    result = (await api.http.post("/v1/execute", json=body)).json()
    return (await api.http.get(f"/v1/executions/{result['id']}")).json()


async def test_a_request_carries_the_settings_and_the_steps_key(api: Api) -> None:
    async with receiver(answering(GOOD)) as server:
        record = await run(api, CALL % server.url)
    assert record["status"] == "completed", record
    assert record["data"]["status"] == 200
    assert record["data"]["body"] == {"ok": True}
    (got,) = server.got
    assert (got.method, json.loads(got.body)) == ("POST", {"q": "é"})
    headers = {name.lower(): value for name, value in got.headers.items()}
    assert headers["x-own"] == "yes!"
    assert headers["content-type"] == "application/json"
    assert headers["idempotency-key"] == f"{record['id']}/call/1"


@pytest.mark.parametrize("status", ["408 Slow", "429 Busy", "500 Oops", "503 Later"])
async def test_what_may_pass_is_tried_again(api: Api, status: str) -> None:
    async with receiver(answering(reply(status), GOOD)) as server:
        record = await run(api, CALL % server.url)
    assert record["status"] == "completed"
    assert record["steps"][0]["attempts"] == 2
    keys = [got.headers.get("Idempotency-Key") or got.headers["idempotency-key"] for got in server.got]  # fmt: skip # noqa: E501
    assert [key.rpartition("/")[2] for key in keys] == ["1", "2"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply("404 No", b"no such thing"), "answered 404: no such thing"),
        (reply("302 Found", b"", "Location: /x"), "redirects are not followed"),
        (reply("200 OK", b"x" * 3000), "INFERPIPE_HTTP_ANSWER_MAX_BYTES"),
    ],
)
async def test_what_will_not_pass_fails_at_once(api: Api, answer: bytes, words: str) -> None:
    async with receiver(answering(answer)) as server:
        record = await run(api, CALL % server.url)
    assert (record["status"], record["errorCode"]) == ("failed", "STEP_FAILED")
    assert words in record["error"]
    assert len(server.got) == 1


async def test_a_broken_answer_is_tried_again_and_then_fails(api: Api) -> None:
    async with receiver(answering(b"nonsense\r\n\r\n")) as server:
        record = await run(api, CALL % server.url)
    assert (record["status"], record["steps"][0]["attempts"]) == ("failed", 3)


async def test_an_address_that_is_not_public_is_refused(api: Api) -> None:
    record = await run(api, CALL % "http://127.0.0.2:9/")
    assert record["status"] == "failed"
    assert "not public" in record["error"]
    assert record["steps"][0]["attempts"] == 1


async def test_retry_after_is_heeded(api: Api) -> None:
    busy = reply("429 Busy", b"", "Retry-After: 1")
    async with receiver(answering(busy, GOOD)) as server:
        record = await run(api, CALL % server.url)
    assert record["status"] == "completed"
    assert record["timing"]["runMs"] >= 1000


async def test_publish_and_emit_reach_the_stream_and_the_log(api: Api) -> None:
    record = await run(
        api,
        """
        steps:
          - {id: half, publish: {progress: 50, message: "half"}}
          - {id: told, emit: {name: shop/paid, data: {order: 7}}}
        """,
    )
    assert record["status"] == "completed", record
    path = f"/v1/executions/{record['id']}/stream"
    stream = (await api.http.get(path)).text
    assert "event: step.progress" in stream
    assert '"progress":50.0' in stream
    event_id = record["data"]["id"]
    log = f"{partition_key(topic_partition(4, 'default', 'shop/paid'))}:ev:default"
    store = api.services.executions._store
    async with asyncio.timeout(10):
        while not (rows := await store._calls.call("XRANGE", log, "-", "+")):
            await asyncio.sleep(0.02)
    ((_, members),) = rows
    body = json.loads(members[b"b"])
    assert (
        body.items()
        >= {
            "id": event_id,
            "name": "shop/paid",
            "data": {"order": 7},
            "execution_id": record["id"],
        }.items()
    )

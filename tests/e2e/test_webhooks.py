"""A webhook through the whole service: configured over HTTP, told by the deployed dispatcher."""

import asyncio
import json

import httpx
from standardwebhooks import Webhook as Verifier

from tests.e2e.conftest import API_KEY, Service
from tests.support.receiver import receiver, status


async def test_the_deployed_dispatcher_tells_of_an_end(service: Service) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with (
        httpx.AsyncClient(base_url=service.url, headers=headers, timeout=30) as http,
        receiver(status(200)) as there,
    ):
        made = await http.post("/v1/webhooks", json={"url": there.url, "events": ["*"]})
        assert made.status_code == 201, made.text
        body = {"workflowId": "test-echo", "input": {"n": 1}, "metadata": {"order": 7}}
        started = await http.post("/v1/execute/async", json=body)
        async with asyncio.timeout(30):
            await there.wait_for(1)
        await http.delete(f"/v1/webhooks/{made.json()['id']}")
    got = there.got[0]
    event = Verifier(made.json()["secret"]).verify(got.body, got.headers)
    assert event == json.loads(got.body)
    assert event["data"]["executionId"] == started.json()["id"]
    assert event["data"]["metadata"] == {"order": 7}

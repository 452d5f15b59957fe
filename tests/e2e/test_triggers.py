"""Triggers through the whole service: an event starts, an emitted one answers, a hook takes one."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx
from standardwebhooks import Webhook

from tests.e2e.conftest import API_KEY, Service

ORDER = {
    "triggers": [{"event": "shop/ordered"}],
    "steps": [
        {
            "id": "paid",
            "wait_for_event": {
                "event": "shop/paid",
                "if": "event.data.order == input.order",
                "timeout": "1m",
            },
        }
    ],
}
PAYER = {
    "triggers": [{"webhook": "standard"}],
    "steps": [{"id": "e", "emit": {"name": "shop/paid", "data": {"order": "{{ input.order }}"}}}],
}


async def ended(http: httpx.AsyncClient, workflow_id: str, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(30):
        while True:
            query = {"workflowId": workflow_id, "status": "completed"}
            found = (await http.get("/v1/executions", params=query)).json()["items"]
            if len(found) >= count:
                return list(found)
            await asyncio.sleep(0.05)


async def test_events_and_hooks_start_and_answer(service: Service) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=30) as http:
        for name, definition in (("order", ORDER), ("payer", PAYER)):
            put = await http.put(f"/v1/workflows/{name}", json=definition)
            assert put.status_code in (200, 201), put.text
        ordered = [{"name": "shop/ordered", "id": f"o{n}", "data": {"order": n}} for n in range(5)]
        for _ in range(2):  # the second time they are known
            sent = await http.post(f"/e/{API_KEY}", json=ordered)
            assert sent.json() == {"ids": [f"o{n}" for n in range(5)], "status": 200}
        async with asyncio.timeout(30):
            while True:
                query = {"workflowId": "order", "status": "waiting"}
                if len((await http.get("/v1/executions", params=query)).json()["items"]) == 5:
                    break
                await asyncio.sleep(0.05)
        hook = (await http.post("/v1/workflows/payer/hook")).json()
        for order in range(5):
            body, at = f'{{"order": {order}}}', datetime.now(UTC)
            signature = {
                "webhook-id": f"m{order}",
                "webhook-timestamp": str(int(at.timestamp())),
                "webhook-signature": Webhook(hook["secret"]).sign(f"m{order}", at, body),
            }
            answer = await http.post("/hooks/default/payer", content=body, headers=signature)
            assert answer.status_code == 202, answer.text
        assert len(await ended(http, "payer", 5)) == 5
        orders = await ended(http, "order", 5)
        assert {one["trigger"]["type"] for one in orders} == {"event"}
        for name in ("order", "payer"):
            await http.delete(f"/v1/workflows/{name}")

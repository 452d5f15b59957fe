"""A service that tells webhooks: the API and an executor of `api.py`, dispatchers that can die."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.webhooks import dispatcher_of, guarded_http
from serve_app.adapters.redis_connect import RedisConnections, connect
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.services.deliveries import Dispatcher
from tests.support.api import Api, running_api
from tests.support.receiver import Receiver

ALLOWED = "127.0.0.1/32"
WITHIN_S = 30.0


@dataclass
class Running:
    """A dispatcher, its connections and its task."""

    dispatcher: Dispatcher
    stores: RedisConnections
    http: Any
    task: "asyncio.Task[None]"


@dataclass
class Hooks:
    """The API, and the dispatchers that run now."""

    api: Api
    dispatchers: list[Running] = field(default_factory=list)

    async def start_dispatcher(self, **given: object) -> Running:
        """As the deployment does it, with other settings where some are given."""
        settings = replace_settings(self.api, given)
        stores = connect(settings, SystemClock())
        http = guarded_http(settings)
        dispatcher = dispatcher_of(settings, stores, http, SystemClock(), SystemEntropy())
        running = Running(dispatcher, stores, http, asyncio.ensure_future(dispatcher.run()))
        self.dispatchers.append(running)
        while not dispatcher.looked_at_s:
            await asyncio.sleep(0.005)
        return running

    async def stop_dispatcher(self, running: Running) -> None:
        """As Ctrl-C does it."""
        self.dispatchers.remove(running)
        running.task.cancel()
        await asyncio.wait((running.task,))
        await running.http.close()
        await running.stores.close()

    async def kill_dispatcher(self, running: Running) -> None:
        """As kill -9 does it: nothing that it would still say reaches the store."""

        async def unheard(*command: object) -> object:
            await asyncio.Event().wait()
            return None

        running.stores.calls.call = unheard  # type: ignore[method-assign]
        self.dispatchers.remove(running)
        task = running.task
        # Its last words hang: they are cancelled too, as often as it takes.
        while not task.done():
            task.cancel()
            await asyncio.sleep(0.01)
            for other in asyncio.all_tasks():
                if "_give_back" in repr(other.get_coro()):
                    other.cancel()
        await running.http.close()
        await running.stores.nodes.close()

    async def create(self, url: str, **members: object) -> dict[str, Any]:
        """A webhook, made over the API."""
        body = {"url": url, "events": ["*"], **members}
        made = await self.api.http.post("/v1/webhooks", json=body)
        assert made.status_code == 201, made.text
        return dict(made.json())

    async def execute(self, mode: str = "/async", **input_: object) -> str:
        """The id of a `test-echo` execution."""
        body = {"workflowId": "test-echo", "input": input_ or {"n": 1}}
        made = await self.api.http.post(f"/v1/execute{mode}", json=body)
        assert made.status_code in (200, 202), made.text
        return str(made.headers.get("x-execution-id"))

    async def deliveries(self, webhook_id: str, query: str = "") -> list[dict[str, Any]]:
        got = await self.api.http.get(f"/v1/webhooks/{webhook_id}/deliveries{query}")
        assert got.status_code == 200, got.text
        return list(got.json()["items"])

    async def until(self, webhook_id: str, status: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until so many deliveries have a status."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                found = await self.deliveries(webhook_id, f"?status={status}&limit=200")
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.02)

    async def got(self, there: Receiver, count: int) -> None:
        async with asyncio.timeout(WITHIN_S):
            await there.wait_for(count)


def replace_settings(api: Api, given: dict[str, object]) -> Any:
    return api.services.settings.model_copy(update=given)


@asynccontextmanager
async def running_hooks(url: str, data_dir: Path, **given: object) -> AsyncIterator[Hooks]:
    """The service without Ray; start dispatchers yourself."""
    settings = {"egress_allow": (ALLOWED,), "webhook_lease_ms": 1000, **given}
    async with running_api(url, data_dir, **settings) as api:
        hooks = Hooks(api)
        try:
            yield hooks
        finally:
            for running in list(hooks.dispatchers):
                await hooks.stop_dispatcher(running)

"""The unmodified `inngest` package sends events here."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import inngest
import pytest
from inngest._internal.errors import SendEventsError  # it has no public name

from tests.support.api import ADMIN_KEY
from tests.support.live_api import live_api

HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}
DEFINITION = {
    "triggers": [{"event": "app/chat.requested", "if": "event.data.query != ''"}],
    "steps": [{"id": "a", "transform": {"id": "{{ event.id }}", "query": "{{ input.query }}"}}],
}


@pytest.fixture(scope="module")
def url(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_api(valkey_url, tmp_path_factory.mktemp("live"), dev=True) as address:
        put = httpx.put(f"{address}/v1/workflows/chat", json=DEFINITION, headers=HEADERS)
        assert put.status_code == 201, put.text
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[Callable[..., inngest.Inngest]]:
    """Makes clients; the package itself never closes its connections."""
    made: list[inngest.Inngest] = []

    def make(**given: Any) -> inngest.Inngest:
        urls = {"api_base_url": url, "event_api_base_url": url}
        made.append(inngest.Inngest(app_id="learn", is_production=False, **urls, **given))
        return made[-1]

    yield make
    for one in made:
        one._http_client._http_client_sync.close()
        await one._http_client._http_client.aclose()


def executions(url: str, count: int) -> list[dict[str, object]]:
    """What the workflow gave, once there are so many."""
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        query = {"workflowId": "chat", "status": "completed"}
        found = httpx.get(f"{url}/v1/executions", params=query, headers=HEADERS).json()["items"]
        if len(found) >= count:
            one = [f"{url}/v1/executions/{item['id']}" for item in found]
            return [httpx.get(path, headers=HEADERS).json()["data"] for path in one]
        time.sleep(0.02)
    raise AssertionError("too few")


def test_its_events_start_workflows_with_its_default_key_and_with_ours(
    url: str, client: Callable[..., inngest.Inngest]
) -> None:
    ask = inngest.Event(name="app/chat.requested", data={"query": "Paris?"})
    named = inngest.Event(name="app/chat.requested", data={"query": "Rome?"}, id="r1")
    ids = client().send_sync([ask, named])
    assert len(ids) == 2
    assert ids[1] == "r1"
    assert client(event_key=ADMIN_KEY).send_sync(named) == ["r1"]
    client().send_sync(inngest.Event(name="app/chat.requested", data={"query": ""}))
    given = executions(url, 2)
    assert sorted((str(one["id"]), one["query"]) for one in given) == sorted(
        [(ids[0], "Paris?"), ("r1", "Rome?")]
    )


async def test_its_async_send_works_too(client: Callable[..., inngest.Inngest]) -> None:
    assert await client().send(inngest.Event(name="nobody/listens")) != []


@pytest.mark.parametrize(
    ("event", "key"),
    [
        (inngest.Event(name="inngest/function.failed"), None),
        (inngest.Event(name="a b"), None),
        (inngest.Event(name="a"), "a-wrong-key-of-somebody"),
        (inngest.Event(name="a", data={"x": "y" * 300_000}), None),
    ],
)
def test_its_refusals_reach_its_caller(
    client: Callable[..., inngest.Inngest], event: inngest.Event, key: str | None
) -> None:
    sender = client() if key is None else client(event_key=key)
    with pytest.raises(SendEventsError):
        sender.send_sync(event)

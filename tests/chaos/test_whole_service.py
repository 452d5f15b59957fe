"""Random workflows on the whole service, with Ray and a real engine, while each part is killed."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest
import redis

from serve_app.adapters.redis_connect import connect
from serve_app.adapters.redis_store import RedisStore
from serve_app.adapters.system import SystemClock
from serve_app.settings import Settings
from tests.chaos.conftest import Cluster, kill, show
from tests.support.chaos.generator import Generator
from tests.support.chaos.http_driver import HttpDriver
from tests.support.chaos.judge import Found, judge_executions, read
from tests.support.chaos.ledger import Ledger
from tests.support.chaos.oracle import Oracle
from tests.support.chaos.outside import Outside
from tests.support.receiver import receiver

EXECUTIONS = 80
SECONDS = 40
WITHIN_S = 200
PARTS = ("workflow_executor", "model_replica", "router", "ingress", "webhook_dispatcher")
PARTITIONS = 16
pytestmark = pytest.mark.timeout(500)


@asynccontextmanager
async def a_store(cluster: Cluster) -> AsyncIterator[RedisStore]:
    """The store, past the API."""
    settings = Settings(redis_url=cluster.endpoint()["url"], partitions=PARTITIONS)
    stores = connect(settings, SystemClock())
    yield stores.store
    await stores.close()


def executions_of(cluster: Cluster, workflow_ids: set[str]) -> list[str]:
    """All executions of these workflows, children included."""
    found: list[str] = []
    with redis.Redis.from_url(cluster.endpoint()["url"]) as client:
        for key in client.scan_iter("ip:*:ix:default:wf:*", count=1000):
            if key.decode().rpartition(":wf:")[2] in workflow_ids:
                found += [one.decode() for one in client.zrange(key, 0, -1)]
    return found


async def kill_parts(cluster: Cluster, killed: Counter[str]) -> None:
    """Kill one process of each part after the other, twice round."""
    chance = random.Random(1)
    for part in (*PARTS, *PARTS):
        await asyncio.sleep(SECONDS / len(PARTS) / 2)
        pids = await asyncio.to_thread(cluster.service.replica_pids, part)
        if pids:
            kill(chance.choice(pids))
            killed[part] += 1


async def test_every_promise_is_kept_by_the_whole_service(
    cluster: Cluster, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    with closing(Ledger(tmp_path / "ledger.jsonl")) as ledger:
        await play(cluster, http, ledger)


async def play(cluster: Cluster, http: httpx.AsyncClient, ledger: Ledger) -> None:
    outside = Outside(ledger)
    killed: Counter[str] = Counter()
    async with receiver(outside.receive) as there, a_store(cluster) as store:
        url = f"http://127.0.0.1:{there.port}"
        generator = Generator(1, f"{url}/effects", is_model_known=False)
        for document in generator.make(24):
            made = await http.put(f"/v1/workflows/{document['id']}", json=document)
            assert made.is_success, made.text
        hook = await http.post("/v1/webhooks", json={"url": f"{url}/hook", "events": ["*"]})
        assert hook.status_code == 201, hook.text
        driver = HttpDriver(http, ledger, Oracle(generator.documents), PARTITIONS)
        plans = generator.plans(EXECUTIONS)
        async with asyncio.TaskGroup() as group:
            group.create_task(driver.submit(plans, SECONDS, WITHIN_S))
            group.create_task(kill_parts(cluster, killed))
        await asyncio.to_thread(cluster.service.wait_healthy, 120)
        ids = executions_of(cluster, {document["id"] for document in generator.documents})
        async with asyncio.timeout(60):
            while not set(ids) <= {one.execution_id for one in ledger.hooks}:
                await asyncio.sleep(0.2)
        found: dict[str, Found] = {one: await read(store, one) for one in ids}
        assert (await http.delete(f"/v1/webhooks/{hook.json()['id']}")).status_code == 204
    verdicts = judge_executions(found, ledger, driver.oracle, PARTITIONS)
    show(
        f"the whole service: kill -9 of {', '.join(PARTS)}",
        {
            "kills": dict(killed),
            "executions": {str(one): n for one, n in verdicts.statuses.items()},
            "calls seen outside": len(ledger.calls),
            "webhooks seen outside": len(ledger.hooks),
            "streams read": len(ledger.views),
            "signals acknowledged": len(ledger.signalled),
            "calls repeated, readers cut off": dict(ledger.notes),
            "violations": len(verdicts.problems),
        },
    )
    assert verdicts.problems == []
    assert set(killed) == set(PARTS)

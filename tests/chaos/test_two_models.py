"""Two models in one service: each answers under its names, and one's loss is not the other's."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.chaos.conftest import Cluster, ended, kill, prepare_cluster
from tests.support.tiny_model import make_tiny_model

ASK = {"messages": [{"role": "user", "content": "Tell me of the sea"}], "temperature": 0}
PICKING = {
    "steps": [
        {
            "id": "say",
            "generate": {
                "model": "{{ input.model }}",
                "prompt": "Tell me of the sea",
                "temperature": 0,
                "max_tokens": 40,
            },
        }
    ]
}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = prepare_cluster(tmp_path_factory.mktemp("both"))
    other = make_tiny_model(cluster.base / "other", seed=7)
    cluster.settings["INFERPIPE_MODELS"] = json.dumps(
        [
            {"name": "tiny", "path": str(cluster.model), "aliases": ["gpt-tiny"]},
            {"name": "org/other", "path": str(other), "engine_seqs_max": 8},
        ]
    )
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
async def http(both: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with both.connect() as client:
        yield client


async def say(http: httpx.AsyncClient, **wish: Any) -> tuple[str, str]:
    """Who answered, and what."""
    answer = await http.post("/v1/chat/completions", json={**ASK, "max_tokens": 40, **wish})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["model"], body["choices"][0]["message"]["content"]


async def pick(http: httpx.AsyncClient, model: str) -> dict[str, Any]:
    body = {"workflowId": "picking", "input": {"model": model}}
    started = await http.post("/v1/execute/async", json=body)
    [record] = await ended(http, [started.json()["id"]], within_s=120)
    return record


async def test_each_model_answers_under_its_names(both: Cluster, http: httpx.AsyncClient) -> None:
    cards = (await http.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "gpt-tiny", "org/other"]
    tiny, other = await say(http, model="tiny"), await say(http, model="org/other")
    assert (tiny[0], other[0]) == ("tiny", "org/other")
    assert tiny[1] != other[1]
    assert (await http.get("/v1/models/org/other")).json()["max_model_len"] == 512
    assert await say(http, model="gpt-tiny") == await say(http) == tiny
    refused = await http.post("/v1/chat/completions", json={**ASK, "model": "nobody"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert all(name in refused.text for name in ("tiny", "gpt-tiny", "org/other"))
    put = await http.put("/v1/workflows/picking", json=PICKING)
    assert put.status_code == 201, put.text
    assert (await pick(http, "org/other"))["data"] == other[1]
    assert (await pick(http, ""))["data"] == (await pick(http, "gpt-tiny"))["data"] == tiny[1]
    lost = await pick(http, "nobody")
    assert lost["status"] == "failed"
    assert "no model 'nobody'; available: gpt-tiny, org/other, tiny" in lost["error"]
    hosts = (await http.get("/v1/hosts")).json()
    assert "org/other" in json.dumps(hosts)


async def test_one_models_loss_is_not_the_others(both: Cluster, http: httpx.AsyncClient) -> None:
    before = await say(http, model="org/other")
    first, second = both.service.replica_pids("model_replica")
    kill(both.service.replica_pids("model_replica_2")[0])
    assert {first, second} > set(both.service.replica_pids("model_replica_2"))
    assert (await say(http, model="tiny"))[0] == "tiny"
    # A step of the lost model waits for its next replica.
    put = await http.put("/v1/workflows/picking", json=PICKING)
    assert put.status_code in {200, 201}
    record = await pick(http, "org/other")
    assert record["data"] == before[1]
    async with asyncio.timeout(60):
        while "missing" in dict(both.service.health()["services"])["models"]:  # type: ignore[call-overload]
            await asyncio.sleep(0.2)

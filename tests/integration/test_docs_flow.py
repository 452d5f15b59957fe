"""Each example of docs/flow-control.md does what the page says, over HTTP and a real store."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.adapters.system import SystemClock
from serve_app.core.inference import Chunk, FinishReason, GenerationRequest, Grant, Usage
from serve_app.core.journal import partition_of
from serve_app.services.inference import Inference
from tests.support.api import Api, ScriptedPlane, running_api

PAGE = (Path(__file__).parents[2] / "docs" / "flow-control.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
WITHIN_S = 30
HELD_MAX = 64  # executions that the harness's worker owns at once


class HeldPlane(ScriptedPlane):
    """A model that answers when the test says so; it notes what it was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.keys: list[str] = []
        self.inside = 0
        self._places = asyncio.Semaphore(0)
        self._changed = asyncio.Condition()

    async def generate(
        self, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request.messages[-1].content)
        self.keys.append(request.request_id)
        await self._count(1)
        try:
            await self._places.acquire()
            yield Chunk("said", (1,), FinishReason.STOP, Usage(20, 100))
        finally:
            await self._count(-1)

    def release(self, count: int = 10_000) -> None:
        for _ in range(count):
            self._places.release()

    async def until(self, inside: int) -> None:
        async with asyncio.timeout(WITHIN_S), self._changed:
            await self._changed.wait_for(lambda: self.inside == inside)

    async def _count(self, change: int) -> None:
        async with self._changed:
            self.inside += change
            self._changed.notify_all()


@dataclass
class Stage:
    """The service, the model behind it, and the example's workflow."""

    api: Api
    plane: HeldPlane
    workflow_id: str
    section: str

    async def start(self, given: object, **members: Any) -> httpx.Response:
        return await self._call("/v1/execute/async", given, members)

    async def run(self, given: object, **members: Any) -> httpx.Response:
        return await self._call("/v1/execute", given, members)

    async def ended(self, *started: httpx.Response) -> list[dict[str, Any]]:
        """The records of executions, once they have ended."""
        found = []
        async with asyncio.timeout(WITHIN_S):
            for one in started:
                record: dict[str, Any] = {}
                while record.get("status") not in ("completed", "failed"):
                    await asyncio.sleep(0.02)
                    record = (await self.api.http.get(f"/v1/executions/{one.json()['id']}")).json()
                found.append(record)
        return found

    async def _call(self, path: str, given: object, members: dict[str, Any]) -> httpx.Response:
        headers = members.pop("headers", None)
        body = {"workflowId": self.workflow_id, "input": given, **members}
        return await self.api.http.post(path, json=body, headers=headers)


async def concurrency(stage: Stage) -> None:
    ada = [await stage.start({"userId": "ada", "topic": n}) for n in range(3)]
    bob = await stage.start({"userId": "bob", "topic": 0})
    await stage.plane.until(inside=3)
    assert sorted(stage.plane.asked) == ["Report on 0", "Report on 0", "Report on 1"]
    assert (await stage.run({"userId": "ada", "topic": 3})).status_code == 429
    stage.plane.release()
    assert {record["status"] for record in await stage.ended(*ada, bob)} == {"completed"}


async def singleton(stage: Stage) -> None:
    first = await stage.start({"day": "monday"})
    await stage.plane.until(inside=1)
    assert (await stage.start({"day": "tuesday"})).status_code == 429
    stage.plane.release()
    await stage.ended(first)
    async with asyncio.timeout(WITHIN_S):  # the place comes back by a message
        while (await stage.start({"day": "tuesday"})).status_code == 429:
            await asyncio.sleep(0.02)


async def starts(stage: Stage) -> None:
    stage.plane.release()
    for _ in range(2):
        assert (await stage.run({"customer": "acme"})).status_code == 200
    refused = await stage.run({"customer": "acme"})
    assert refused.status_code == 429
    assert 0 < int(refused.headers["Retry-After"]) <= 30
    assert refused.headers["RateLimit-Limit"] == "2"
    assert (await stage.run({"customer": "other"})).status_code == 200
    assert (await stage.start({"customer": "acme"})).status_code == 202


async def tokens(stage: Stage) -> None:
    held = [await stage.start({"text": n}) for n in range(4)]
    await stage.plane.until(inside=4)
    refused = await stage.run({"text": 4})
    assert (refused.status_code, refused.headers["RateLimit-Limit"]) == (429, "2000")
    stage.plane.release()
    await stage.ended(*held)  # each took 500 and has used 120
    async with asyncio.timeout(WITHIN_S):
        while (await stage.run({"text": 5})).status_code == 429:
            await asyncio.sleep(0.02)


async def priority(stage: Stage) -> None:
    wish = json.loads(stage.section.split("```json\n")[1].split("```")[0])
    assert wish.pop("workflowId") == stage.workflow_id
    plain = [await stage.start({"ticket": n}) for n in range(3)]
    await stage.plane.until(inside=1)
    urgent = await stage.start(wish.pop("input"), **wish)
    store = stage.api.services.executions._store
    await asyncio.gather(*(store.relay(partition, 100) for partition in range(4)))
    stage.plane.release()
    await stage.ended(*plain, urgent)
    assert stage.plane.asked.index("Answer the site is down") == 1


async def fairness(stage: Stage) -> None:
    """In its partition the one execution of the light workspace is among the next."""
    heavy = await asyncio.gather(*(stage.start({"row": n}) for n in range(5 * HELD_MAX)))
    await stage.plane.until(inside=HELD_MAX)
    light_key = await stage.api.new_workspace("light")
    await stage.api.http.put(
        f"/v1/workflows/{stage.workflow_id}", json=document_of(stage.section), headers=light_key
    )
    light = await stage.start({"row": "light"}, headers=light_key)
    light_id = light.json()["id"]
    stage.plane.release()
    await stage.ended(*heavy)
    partition = partition_of(light_id, 4)
    later = (key.split("/")[0] for key in stage.plane.keys[HELD_MAX:])
    here = [an_id for an_id in later if partition_of(an_id, 4) == partition]
    assert len(here) > 2 * HELD_MAX // 4
    assert here.index(light_id) <= HELD_MAX // 4  # one batch of claims


async def cache(stage: Stage) -> None:
    stage.plane.release()
    results = [(await stage.run({"word": "fold"})).json() for _ in range(2)]
    assert [result["cached"] for result in results] == [False, True]
    assert results[1]["usage"]["totalTokens"] == 0
    assert (await stage.run({"word": "fork"})).json()["cached"] is False
    assert stage.plane.asked == ["Define fold", "Define fork"]


SCENARIOS: dict[str, Callable[[Stage], Awaitable[None]]] = {
    "Concurrency": concurrency,
    "Singleton": singleton,
    "Rate of starts": starts,
    "Rate of tokens": tokens,
    "Priority": priority,
    "Fairness": fairness,
    "Cache": cache,
}


def document_of(section: str) -> dict[str, Any]:
    example = section.split("```yaml\n")[1].split("```", maxsplit=1)[0]
    document: dict[str, Any] = yaml.safe_load(example)
    return document


@pytest.fixture
async def staged(valkey_url: str, tmp_path: Path) -> AsyncIterator[tuple[Api, HeldPlane]]:
    plane = HeldPlane()
    inference = Inference(plane, plane, SystemClock(), resume_wait_s=1.0)
    async with running_api(valkey_url, tmp_path, inference) as api:
        yield api, plane


@pytest.mark.parametrize("heading", SECTIONS)
async def test_an_example_does_what_the_page_says(
    heading: str, staged: tuple[Api, HeldPlane]
) -> None:
    api, plane = staged
    section = SECTIONS[heading]
    document = document_of(section)
    put = await api.http.put(f"/v1/workflows/{document['id']}", json=document)
    assert put.status_code == 201, put.text
    await SCENARIOS[heading](Stage(api, plane, document["id"], section))


def test_every_section_has_an_example() -> None:
    assert SECTIONS.keys() == SCENARIOS.keys()
    assert PAGE.count("```yaml\n") == len(SCENARIOS)

"""An executor lost in the middle of an answer: the next one goes on behind the journal's tokens.

Over a real store, the real router and real links; the engine is scripted and steps when told to.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from serve_app.adapters.json_schema import JsonSchemas
from serve_app.adapters.system import SystemEntropy
from serve_app.core.execution import Execution, Status
from serve_app.core.inference import GenerationRequest, Resumed
from serve_app.services.executions import Executions
from serve_app.steps.generate import generate_step
from tests.integration.test_executor import Bench, ended, wish
from tests.support.checker import Entry
from tests.support.replicas import Replicas, replicas
from tests.support.scripted_engine import ScriptedEngine

TOKENS = 30
TEXT = "".join(f"t{index} " for index in range(TOKENS))
PLAIN = {"prompt": "say it", "max_tokens": TOKENS}
WORKFLOWS = [
    {"id": name, "steps": [{"id": "say", "generate": {**PLAIN, **settings}}]}
    for name, settings in {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 1, "seed": 7},
        "sampled": {"temperature": 1},
        "guided": {"temperature": 0, "output_schema": {"type": "array"}},
    }.items()
]
JSON = ["[", *("1," for _ in range(TOKENS - 3)), "1]"]  # one token less than is allowed
pytestmark = pytest.mark.timeout(60)


@dataclass
class Scene:
    """Two executors over one engine, and an answer under way."""

    bench: Bench
    fleet: Replicas
    executions: Executions

    @property
    def engine(self) -> ScriptedEngine:
        [replica] = self.fleet.living.values()
        return replica.engine

    async def begin(self, workflow_id: str, tokens: int) -> str:
        started = await self.executions.start(wish(workflow_id))
        await self.say(started.execution.id, tokens)
        return started.execution.id

    async def say(self, execution_id: str, count: int) -> None:
        """Have the engine say a few more tokens, and wait until they are in the journal."""
        known = len(await self.token_ids(execution_id))
        async with asyncio.timeout(20):
            while not self.engine.running:
                await asyncio.sleep(0.005)
            for _ in range(count):
                self.engine.step()
            while len(await self.token_ids(execution_id)) < known + count:
                await asyncio.sleep(0.005)

    async def lose_owner(self, execution_id: str) -> None:
        name = await self.bench.owner(execution_id)
        await self.bench.kill(name)
        await self.bench.start_worker(f"{name}+")

    async def finish(self, execution_id: str) -> Execution:
        task = asyncio.create_task(ended(self.executions, execution_id))
        while not task.done():
            self.engine.step()
            await asyncio.sleep(0.005)
        return task.result()[0]

    async def journal(self, execution_id: str) -> list[Entry]:
        return await self.bench.journal(execution_id)

    async def token_ids(self, execution_id: str) -> list[int]:
        return [
            token
            for entry in await self.journal(execution_id)
            if entry.kind == "chunk"
            for token in entry.data["token_ids"]
        ]


@pytest.fixture
async def scene(store_url: str) -> AsyncIterator[Scene]:
    def script(request: GenerationRequest) -> list[str]:
        return JSON if request.output_schema else [f"t{index} " for index in range(TOKENS)]

    def engine() -> ScriptedEngine:
        return ScriptedEngine(script, is_manual=True)

    async with replicas(engine, count=1) as fleet:
        bench = Bench(store_url)
        bench.step_types["generate"] = generate_step(
            fleet.inference, JsonSchemas(), SystemEntropy()
        )
        bench.catalog.workflows = {str(one["id"]): bench.parse(one) for one in WORKFLOWS}
        bench.open(store_url)
        await bench.client.flushall()
        await bench.start_worker("w1")
        await bench.start_worker("w2")
        async with bench.surface() as (executions, _):
            yield Scene(bench, fleet, executions)
        await bench.close()


@pytest.mark.parametrize(
    ("workflow_id", "is_replayed", "mark"),
    [
        ("greedy", False, Resumed.EXACT),
        ("seeded", True, Resumed.EXACT),
        ("sampled", False, Resumed.APPROXIMATE),
    ],
)
async def test_the_rest_alone_is_made_and_streamed(
    scene: Scene, workflow_id: str, is_replayed: bool, mark: Resumed
) -> None:
    execution_id = await scene.begin(workflow_id, 7)
    await scene.lose_owner(execution_id)
    result = await scene.finish(execution_id)
    assert (result.status, result.data) == (Status.COMPLETED, TEXT)
    step = result.steps["say"]
    assert (step.attempt, step.losses, step.resumed) == (1, 1, mark)
    assert result.usage.completion_tokens == TOKENS
    assert result.wasted_tokens == 0
    journal = await scene.journal(execution_id)
    assert await scene.token_ids(execution_id) == list(range(TOKENS))
    assert "".join(e.data["text"] for e in journal if e.kind == "chunk") == TEXT
    kinds = [entry.kind for entry in journal]
    assert ("step.retrying" in kinds, kinds.count("step.resumed")) == (False, 1)
    first, second = scene.engine.submitted
    assert first.request_id in scene.engine.aborted  # its caller is gone
    assert second.resume_ids == (() if is_replayed else tuple(range(7)))
    assert second.seed == first.seed
    assert scene.fleet.admitted[-1].is_resumed
    await scene.bench.check(execution_id)


async def test_answers_survive_one_loss_after_another(scene: Scene) -> None:
    execution_id = await scene.begin("greedy", 3)
    for count in (2, 5, 1):
        await scene.lose_owner(execution_id)
        await scene.say(execution_id, count)
    await scene.lose_owner(execution_id)
    result = await scene.finish(execution_id)
    assert (result.data, result.steps["say"].losses) == (TEXT, 4)
    assert [len(one.resume_ids) for one in scene.engine.submitted] == [0, 3, 5, 10, 11]
    await scene.bench.check(execution_id)


async def test_a_guided_answer_is_whole(scene: Scene) -> None:
    execution_id = await scene.begin("guided", 9)
    await scene.lose_owner(execution_id)
    result = await scene.finish(execution_id)
    assert result.data == [1] * (TOKENS - 2)

"""The model plane over real engines: cache hits by policy, what a lost replica costs, and waste.

Run it as `python -m loadtests.plane` from the root of the repository; it takes about two minutes,
with two vLLM engines of one thread each and a random model, behind the real links and router in one
process. The policies differ in the admission alone. Latencies on a shared machine are noise;
compare the ratios of one run.
"""

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from serve_app.adapters.system import SystemClock
from serve_app.adapters.vllm_engine import EngineSettings, VllmEngine
from serve_app.core.inference import AdmitRequest, GenerationRequest, Grant, Message, Placement
from serve_app.services.inference import Inference
from tests.support.replicas import Replicas
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_model import make_tiny_model

CONTEXT = 2048
KV_GIB = 0.016  # 16 k tokens: not all groups in one engine
GROUPS = 24
GROUP_CHARS = 1600  # about 900 tokens of the tiny vocabulary
REQUESTS = 240
AT_ONCE = 4
STREAMS = 20
ABORTS = 40
ABORT_AFTER = 10
ANSWER_TOKENS = 400
SEED = 20261121
WORDS = (
    "sea",
    "moon",
    "old",
    "clock",
    "tower",
    "child",
    "story",
    "ships",
    "stars",
    "rain",
    "stone",
)


@dataclass
class PinningAdmission:
    """The real router behind a policy that names the host; with None from it the router chooses."""

    fleet: Replicas
    pick: Callable[[list[str]], str | None]

    async def admit(self, request: AdmitRequest) -> Grant:
        """Ask the router, for one host if the policy says so."""
        host = self.pick(sorted(self.fleet.living))
        if host is not None:
            request = replace(request, placement=Placement(host=host))
        return await self.fleet.router.admit(request)

    async def decisions(self, limit: int) -> Any:
        """As the router."""
        return await self.fleet.router.decisions(limit)


@dataclass
class Tally:
    """What the answers of one policy took."""

    first_ms: list[float] = field(default_factory=list)
    cached: int = 0
    prompt: int = 0


@asynccontextmanager
async def fleet_of(engines: list[Any]) -> AsyncIterator[Replicas]:
    """Replicas over engines that are there already and outlive it."""
    left = list(engines)
    fleet = Replicas(lambda: left.pop(0))
    running = [
        asyncio.ensure_future(fleet.router.run()),
        asyncio.ensure_future(fleet.report_for_ever()),
    ]
    for _ in engines:
        await fleet.start()
    try:
        yield fleet
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        await fleet.link.close()
        for replica in fleet.living.values():
            await replica.server.close()


def prompt(group: int, number: int) -> str:
    """A group's long beginning and a short end of its own."""
    chance = random.Random(group)
    text = f"{group}"
    while len(text) < GROUP_CHARS:
        text += f" {chance.choice(WORDS)}"
    return f"{text} {number}"


async def cache_hits(engines: list[Any]) -> None:
    """As many requests under each policy, of words of its own, so that caches start cold."""
    print("policy | hit ratio | TTFT p50 ms | p95 ms")
    chance = random.Random(SEED)
    order = [chance.randrange(GROUPS) for _ in range(REQUESTS)]
    turns = iter(range(10 * REQUESTS))
    policies: dict[str, Callable[[list[str]], str | None]] = {
        "random": chance.choice,
        "round robin": lambda hosts: hosts[next(turns) % len(hosts)],
        "ours": lambda _: None,
    }
    for index, (name, pick) in enumerate(policies.items()):
        tally = Tally()
        async with fleet_of(engines) as fleet:
            inference = Inference(PinningAdmission(fleet, pick), fleet.link, fleet.clock, 5.0)
            room = asyncio.Semaphore(AT_ONCE)
            texts = [prompt(1000 * index + group, number) for number, group in enumerate(order)]
            async with asyncio.TaskGroup() as group:
                for number, text in enumerate(texts):
                    asked = GenerationRequest(
                        f"{name}{number}", (Message("user", text),), max_tokens=4, temperature=0.0
                    )
                    group.create_task(ask(inference, asked, room, tally))
        tally.first_ms.sort()
        count = len(tally.first_ms)
        p50, p95 = tally.first_ms[count // 2], tally.first_ms[count * 95 // 100]
        print(f"{name} | {tally.cached / tally.prompt:.2f} | {p50:.0f} | {p95:.0f}")


async def ask(
    inference: Inference, asked: GenerationRequest, room: asyncio.Semaphore, tally: Tally
) -> None:
    """Have one answer made when there is room."""
    clock = SystemClock()
    async with room:
        began_s, is_first = clock.monotonic_s(), True
        async with aclosing(inference.generate(asked)) as chunks:
            async for chunk in chunks:
                if is_first:
                    tally.first_ms.append((clock.monotonic_s() - began_s) * 1000)
                is_first = False
                if chunk.finish_reason is not None and chunk.usage is not None:
                    tally.cached += chunk.usage.cached_tokens
                    tally.prompt += chunk.usage.prompt_tokens


async def waste(engine: Any) -> None:
    """Tokens that were made after their reader had left, of streams left early."""
    async with fleet_of([engine]) as fleet:

        async def leave_early(number: int) -> int:
            request = GenerationRequest(
                f"left{number}",
                (Message("user", prompt(number, 0)[:200]),),
                max_tokens=ANSWER_TOKENS,
                engine_options={"ignore_eos": True},
            )
            count = 0
            async with aclosing(fleet.inference.generate(request)) as chunks:
                async for chunk in chunks:
                    count += len(chunk.token_ids)
                    if count >= ABORT_AFTER:
                        break
            return count

        read = sum(await asyncio.gather(*(leave_early(number) for number in range(ABORTS))))
        meter = fleet.living["host-1"].meter
        async with asyncio.timeout(10):
            while meter.load().open_count:  # noqa: ASYNC110 - a meter rings no bell
                await asyncio.sleep(0.01)
        made = meter.load().wasted_tokens
    print(
        f"{ABORTS} streams left after {ABORT_AFTER} of {ANSWER_TOKENS} tokens: read {read}, made "
        f"{made}, for nobody {(made - read) / ABORTS:.1f} a stream"
    )


async def lost_replica() -> None:
    """The gap in a stream whose replica is lost; scripted engines that step every 20 ms."""
    clock = SystemClock()
    gaps_ms: list[float] = []
    async with fleet_of([ScriptedEngine(clock=clock, step_s=0.02) for _ in range(2)]) as fleet:

        async def read(number: int) -> None:
            request = GenerationRequest(
                str(number), (Message("user", "say it"),), max_tokens=100, temperature=0.0
            )
            at_s: list[float] = []
            token_ids: list[int] = []
            resumed = None
            async with aclosing(fleet.inference.generate(request)) as chunks:
                async for chunk in chunks:
                    at_s.append(clock.monotonic_s())
                    token_ids += chunk.token_ids
                    resumed = chunk.resumed
            assert token_ids == list(range(100)), "a token was lost or repeated"
            if resumed is not None:
                gaps_ms.append(max(later - at for at, later in pairwise(at_s)) * 1000)

        async with asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(read(number))
            await asyncio.sleep(0.6)
            await fleet.kill("host-1")
    gaps_ms.sort()
    print(
        f"replica lost under {len(gaps_ms)} of {STREAMS} streams: tokens lost or repeated 0, "
        f"longest gap p50 {gaps_ms[len(gaps_ms) // 2]:.0f} ms, max {gaps_ms[-1]:.0f} ms "
        "(a step is 20 ms)"
    )


async def run(engines: list[Any]) -> None:
    """Everything, one after the other."""
    try:
        await lost_replica()
        await cache_hits(engines)
        await waste(engines[0])
    finally:
        for engine in engines:
            await engine.stop()


def main() -> None:
    """Make the model, start two engines, measure."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(Path(folder) / "tiny", context_max=CONTEXT)
        settings = [
            EngineSettings(str(path), ("scripted",), kv_cache_gib=KV_GIB, cpu_cores=(index,))
            for index in range(2)
        ]
        engines = [VllmEngine.start(one, SystemClock()) for one in settings]
        asyncio.run(run(engines))


if __name__ == "__main__":
    main()

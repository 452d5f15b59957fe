"""One seeded run from an empty store to a verdict, and the table over many.

`python -m tests.support.chaos.run 1 2 3` runs these seeds and prints what came of them.
"""

import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.chaos.driver import OwnDriver
from tests.support.chaos.faults import Storm
from tests.support.chaos.generator import Generator
from tests.support.chaos.judge import Verdicts, judge, quiet
from tests.support.chaos.ledger import Ledger, TakeOver
from tests.support.chaos.oracle import Oracle
from tests.support.chaos.world import WORKSPACE, World, a_world

WORKFLOWS = 24
SETTLE_LOOKS = 100
PATIENCE_S = 180.0  # for everything to end once nothing is broken any more


@dataclass(frozen=True)
class Script:
    """How long a run is, and how much happens in it.

    Args:
        kinds: of faults, as `faults.py` names them; none: all.
        settings: of the service, where they differ from the world's.
        bug: passages of the function libraries and what stands there instead, to see whether the
            judge sees it.
        patience_s: for the rest to end, once nothing is broken.
    """

    seconds: float = 15.0
    executions: int = 120
    every_s: tuple[float, float] = (0.4, 1.4)
    kinds: Collection[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    bug: Mapping[str, str] = field(default_factory=dict)
    patience_s: float = PATIENCE_S


@dataclass
class Report:
    """What one run came to."""

    seed: int
    ledger: Ledger
    verdicts: Verdicts
    took_s: float


async def run(seed: int, directory: Path, script: Script) -> Report:
    """Play one seed."""
    begun_s = asyncio.get_running_loop().time()
    async with a_world(directory, given=script.settings) as world:
        generator = Generator(seed, world.effects_url)
        for document in generator.make(WORKFLOWS):
            await world.services.catalog.define(WORKSPACE, document)
        if script.bug:
            await world.plant(script.bug)
        oracle = Oracle(generator.documents)
        storm = Storm(world, seed, script.kinds)
        driver = OwnDriver(world, oracle, seed)
        plans = generator.plans(script.executions)
        late: list[str] = []
        try:
            async with asyncio.TaskGroup() as group:
                until_s = script.seconds + script.patience_s
                group.create_task(driver.submit(plans, script.seconds, until_s))
                group.create_task(storm.rage(script.seconds, script.every_s))
        except* TimeoutError:
            late.append(f"not all had ended {script.patience_s:.0f} s after the last fault")
        if not late:
            await _settle(world)
        verdicts = await judge(world, oracle)
        verdicts.problems += late
        world.deaths += [actor.name for actor in world.actors if not actor.is_alive]
        verdicts.problems += [f"{name} ended by itself; see its log" for name in world.deaths]
    return Report(seed, world.ledger, verdicts, asyncio.get_running_loop().time() - begun_s)


async def _settle(world: World) -> None:
    """Give messages, timers, leases and deliveries time to end; the judge sees what does not."""
    for _ in range(SETTLE_LOOKS):
        if not await quiet(world):
            return
        await asyncio.sleep(0.1)


def table(reports: Sequence[Report]) -> str:
    """What all runs together came to, for people."""
    faults: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    takes: list[TakeOver] = []
    for report in reports:
        faults.update(report.ledger.faults)
        statuses.update(report.verdicts.statuses)
        notes.update(report.ledger.notes)
        takes += report.ledger.take_overs
    rows = [
        ("runs", f"{len(reports)} in {sum(one.took_s for one in reports):.0f} s"),
        ("faults injected", str(faults.total())),
        *((f"  {kind}", str(count)) for kind, count in sorted(faults.items())),
        ("executions", str(statuses.total())),
        *((f"  {status}", str(count)) for status, count in sorted(statuses.items())),
        ("calls seen outside", str(sum(len(one.ledger.calls) for one in reports))),
        ("webhooks seen outside", str(sum(len(one.ledger.hooks) for one in reports))),
        ("streams read", str(sum(len(one.ledger.views) for one in reports))),
        ("signals acknowledged", str(sum(len(one.ledger.signalled) for one in reports))),
        *sorted((name, str(count)) for name, count in notes.items()),
        ("violations", str(sum(len(one.verdicts.problems) for one in reports))),
    ]
    for kind in sorted({one.kind for one in takes}):
        for is_alone in (True, False):
            times = [t.took_s for t in takes if t.kind == kind and t.is_alone is is_alone]
            name = f"take-over after {kind}" + ("" if is_alone else ", among other faults")
            rows.append((name, spread(times)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def spread(values: Sequence[float]) -> str:
    """p50, p99 and the largest, by nearest rank."""
    if not values:
        return "none"
    ordered = sorted(values)
    p50, p99 = (ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 99))
    return f"n {len(ordered)}  p50 {p50:.2f}  p99 {p99:.2f}  max {ordered[-1]:.2f} s"


async def main(seeds: Sequence[int]) -> int:
    reports = []
    for seed in seeds:
        directory = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
        report = await run(seed, directory, Script())
        print(f"seed {seed}: {len(report.verdicts.problems)} violations; {directory}", flush=True)
        for problem in report.verdicts.problems[:20]:
            print(f"    {problem}")
        reports.append(report)
    print(table(reports))
    return int(any(report.verdicts.problems for report in reports))


if __name__ == "__main__":
    sys.exit(asyncio.run(main([int(seed) for seed in sys.argv[1:]])))

"""A little of the chaos suite on every run: random workflows under random faults, and the judge.

`make chaos` plays many more seeds; `docs/chaos.md` says what is promised and injected.
"""

from pathlib import Path

import pytest

from tests.support.chaos.run import Script, run, table

SEEDS = (101, 102)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.timeout(180)
async def test_random_workflows_keep_every_promise(seed: int, tmp_path: Path) -> None:
    report = await run(seed, tmp_path, Script(seconds=6, executions=40, every_s=(0.3, 0.9)))
    print(f"\n{table([report])}")
    assert report.verdicts.problems == []
    assert report.ledger.faults.total() > 4

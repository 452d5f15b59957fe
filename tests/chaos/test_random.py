"""Random workflows under random faults, seed after seed; prints what was promised and kept."""

from pathlib import Path

import pytest

from tests.support.chaos.run import Report, Script, run, table

SEEDS = range(1, 9)
SCRIPT = Script(seconds=15, executions=120)


@pytest.mark.timeout(900)
async def test_every_promise_is_kept(tmp_path: Path) -> None:
    reports: list[Report] = []
    for seed in SEEDS:
        directory = tmp_path / str(seed)
        directory.mkdir()
        reports.append(await run(seed, directory, SCRIPT))
    print(f"\n{table(reports)}")
    assert {one.seed: one.verdicts.problems for one in reports if one.verdicts.problems} == {}

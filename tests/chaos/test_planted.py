"""The judge must be able to find what it looks for: stores with a bug in them, and one without."""

from pathlib import Path

import pytest

from tests.support.chaos.faults import KILL, STOP
from tests.support.chaos.run import Script, run

# The lease is short, so that a stopped owner is stale soon.
SETTINGS = {"lease_ttl_ms": 800, "heartbeat_ms": 150}
FENCE = {
    "if token ~= '' and owner ~= token then return {'stale'} end": "",
    "if token ~= '' and owner ~= token and not is_ours then return {'stale'} end": "",
}
# A run meets a bug only where a fault falls at the right moment; the first that does is enough.
SEEDS = (7, 8, 9)
BUGS = {
    "no fence": (FENCE, "had taken over"),
    "copies of a message applied": (
        {
            "if redis.call('ZSCORE', p .. ':seen', args[1]) then return 0 end\n"
            "  if args[6]": "if args[6]"
        },
        "applied more than once",
    ),
    "a timer in four lost": (
        {
            "elseif h[1] == '' then\n      assign(p, h[5], eid, h[2])": (
                "elseif string.byte(eid, -1) % 4 > 0 and h[1] == '' then\n"
                "      assign(p, h[5], eid, h[2])"
            )
        },
        "still waiting",
    ),
    "the messages of a commit in four lost": (
        {
            "for _ = 1, tonumber(args[at]) do\n    redis.call('XADD', p .. ':outbox'": (
                "for _ = 1, tonumber(args[at]) do\n    "
                "if string.byte(eid, -1) % 4 > 0 then redis.call('XADD', p .. ':outbox'"
            ),
            "args[at + 3])\n    at = at + 3": "args[at + 3]) end\n    at = at + 3",
        },
        "told under 0 webhook ids",
    ),
}


@pytest.mark.parametrize("name", BUGS)
@pytest.mark.timeout(240)
async def test_a_planted_bug_is_found(name: str, tmp_path: Path) -> None:
    bug, said = BUGS[name]
    script = Script(
        seconds=8,
        executions=60,
        every_s=(0.3, 0.8),
        kinds=(STOP, KILL),
        settings=SETTINGS,
        bug=bug,
        patience_s=6,
    )
    said_so: list[str] = []
    for seed in SEEDS:
        directory = tmp_path / str(seed)
        directory.mkdir()
        report = await run(seed, directory, script)
        said_so = [text for text in report.verdicts.problems if said in text]
        if said_so:
            break
    assert said_so

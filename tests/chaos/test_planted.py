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
BUGS = {
    "no fence": (FENCE, "had taken over"),
    "copies of a message applied": (
        {"if redis.call('ZSCORE', p .. ':seen', args[1]) then return 0 end": ""},
        "applied more than once",
    ),
    "a timer in four lost": (
        {
            "elseif h[1] == '' then\n      assign(p, eid, h[2])": (
                "elseif string.byte(eid, -1) % 4 > 0 and h[1] == '' then\n"
                "      assign(p, eid, h[2])"
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
@pytest.mark.timeout(120)
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
    report = await run(7, tmp_path, script)
    assert [text for text in report.verdicts.problems if said in text]

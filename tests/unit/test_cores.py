"""Which cores an engine gets, and its number among those of its machine."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from serve_app.adapters.engine_slot import EngineSlot
from serve_app.core.cores import cores_of

HOLD = (
    "import sys, pathlib; from serve_app.adapters.engine_slot import EngineSlot; "
    "slot = EngineSlot(pathlib.Path(sys.argv[1])); print(slot.index, flush=True); "
    "sys.stdin.read()"
)


@pytest.mark.parametrize(
    ("cores", "count", "threads", "expected"),
    [
        (2, 1, 0, [()]),
        (2, 1, 2, [(0, 1)]),
        (2, 2, 0, [(0,), (1,)]),
        (8, 2, 0, [(0, 1, 2), (3, 4, 5)]),
        (8, 2, 4, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (1, 2, 0, [(0,), (0,)]),
        (3, 4, 0, [(0,), (1,), (2,), (0,)]),
        (2, 3, 9, [(0, 1), (0, 1), (0, 1)]),
    ],
)
def test_the_cores_of_each_engine(
    cores: int, count: int, threads: int, expected: list[tuple[int, ...]]
) -> None:
    assert [cores_of(range(cores), index, count, threads) for index in range(count)] == expected


@pytest.mark.parametrize("cores", [2, 3, 4, 8, 64])
def test_engines_share_no_core_while_there_is_one_for_each(cores: int) -> None:
    given = range(100, 100 + cores)
    for count in range(2, cores + 1):
        own = [set(cores_of(given, index, count)) for index in range(count)]
        assert all(own)
        assert all(one.isdisjoint(other) for one, other in combinations(own, 2))
        assert set.union(*own) <= set(given)


def test_a_number_is_free_again_when_its_process_is_gone_without_a_word(tmp_path: Path) -> None:
    first = EngineSlot(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) == 1
        third = EngineSlot(tmp_path)
        assert (first.index, third.index) == (0, 2)
        other.kill()
        other.wait()
        assert EngineSlot(tmp_path).index == 1
    first.close()
    assert EngineSlot(tmp_path).index == 0

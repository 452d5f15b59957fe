"""Two real engines on one machine, one of them killed under streams of every surface, ten times."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import Cluster, kill, prepare_cluster, show, spread
from tests.support.asking import Asked, Heard, ask

KILLED_AFTER = (1, 3, 8, 15, 25, 40, 60, 80, 110, 150)  # texts of the stream that is first
MIX = {
    ("execute", "greedy"): 3,
    ("execute", "seeded"): 3,
    ("execute", "form"): 2,
    ("openai", "greedy"): 3,
    ("openai", "seeded"): 2,
    ("openai", "form"): 2,
    ("socket", "greedy"): 5,
}
QUESTIONS = [
    Asked(surface, mode, f"a child of {number}")
    for (surface, mode), count in MIX.items()
    for number in range(5, 5 + count)
]
GOES_ON = "generation goes on elsewhere"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = prepare_cluster(tmp_path_factory.mktemp("pair"), INFERPIPE_MODEL_REPLICAS="2")
    cluster.start()
    yield cluster
    cluster.stop()


def replica_count(cluster: Cluster) -> int:
    models = dict(cluster.service.health()["services"])["models"]  # type: ignore[call-overload]
    return int(models.get("replicas", 0))


def wait_for_both(cluster: Cluster) -> None:
    give_up = time.monotonic() + 120
    while replica_count(cluster) != 2:
        assert time.monotonic() < give_up, cluster.service.health()
        time.sleep(0.2)


def compute_cores(pid: int) -> set[tuple[int, ...]]:
    """The cores that a replica's engine is bound to: its bound processes' and threads'."""
    found = set()
    every = set(psutil.Process().cpu_affinity())
    for process in psutil.Process(pid).children(recursive=True):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            [text] = [line for line in lines if line.startswith("Cpus_allowed_list")]
            cores = tuple(map(int, text.split(":")[1].replace("-", ",").split(",")))
            if set(cores) != every:
                found.add(cores)
    return found


async def test_engines_share_no_core(pair: Cluster) -> None:
    wait_for_both(pair)
    if len(psutil.Process().cpu_affinity()) < 2:
        pytest.skip("one core")
    bound = [compute_cores(pid) for pid in pair.service.replica_pids("model_replica")]
    cores = [{core for one in each for core in one} for each in bound]
    assert all(cores)
    assert all(one.isdisjoint(other) for one, other in combinations(cores, 2)), cores


async def test_kill_of_one_of_two_replicas_under_twenty_streams(pair: Cluster) -> None:
    wait_for_both(pair)
    async with pair.connect() as http:
        calm = await asyncio.gather(*(ask(http, question) for question in QUESTIONS))
        rounds = [
            await Round(pair, number, limit).run(calm) for number, limit in enumerate(KILLED_AFTER)
        ]
    extra_ms = [gap for one in rounds for gap in one.cut_ms]
    others_ms = [gap for one in rounds for gap in one.whole_ms]
    count = len(rounds) * len(QUESTIONS)
    total: Counter[str] = sum((one.counts for one in rounds), Counter())
    show(
        f"kill -9 of one of two model replicas under {len(QUESTIONS)} streams, {len(rounds)} times",
        {
            "streams": f"{count}, of them cut {len(extra_ms)}",
            "tokens lost": total["lost"],
            "tokens repeated": total["repeated"],
            "identical text": f"{total['identical']} of {count}",
            "valid JSON": f"{total['json']} of {total['form']}",
            "extra gap of cut streams": spread(extra_ms, "ms"),
            "extra gap of the others": spread(others_ms, "ms"),
        },
    )
    assert extra_ms
    assert (total["lost"], total["repeated"]) == (0, 0)
    assert (total["identical"], total["json"]) == (count, total["form"])


class Round:
    """Twenty streams, and one kill when the first of them has said enough."""

    def __init__(self, cluster: Cluster, number: int, limit: int) -> None:
        self._cluster = cluster
        self._number = number
        self._limit = limit
        self._killed_s = 0.0
        self.counts: Counter[str] = Counter()
        self.cut_ms: list[float] = []
        self.whole_ms: list[float] = []

    async def run(self, calm: list[Heard]) -> "Round":
        await asyncio.to_thread(wait_for_both, self._cluster)
        went_on = self._went_on()
        victim = self._cluster.service.replica_pids("model_replica")[self._number % 2]
        engine = psutil.Process(victim).children(recursive=True)

        def seen(heard: Heard) -> None:
            if not self._killed_s and len(heard.texts) >= self._limit:
                self._killed_s = kill(victim)

        async with self._cluster.connect() as http:
            heard = await asyncio.gather(*(ask(http, question, seen) for question in QUESTIONS))
        assert self._killed_s, "no stream was long enough"
        for got, expected in zip(heard, calm, strict=True):
            self._compare(got, expected)
        self._measure(heard, self._went_on() - went_on)
        _, left = psutil.wait_procs(engine, timeout=10)
        assert left == []
        return self

    def _compare(self, got: Heard, expected: Heard) -> None:
        missing = expected.completion_tokens - got.completion_tokens
        self.counts["lost"] += max(0, missing)
        self.counts["repeated"] += max(0, -missing)
        self.counts["identical"] += got.text == expected.text
        if got.execution_id:
            [journal] = self._cluster.check(got.execution_id)
            assert [entry for entry in journal if entry.kind == "step.retrying"] == []
        if got.asked.mode == "form":
            self.counts["form"] += 1
            self.counts["json"] += len(json.loads(got.text)) == 20

    def _measure(self, heard: list[Heard], cut_count: int) -> None:
        """Of the streams that were under way at the kill; the longest gaps are the cut ones'."""
        gaps_ms = [
            (gap_s - one.usual_gap_s()) * 1000
            for one in heard
            if (gap_s := one.gap_s(self._killed_s)) is not None
        ]
        gaps_ms.sort(reverse=True)
        self.cut_ms, self.whole_ms = gaps_ms[:cut_count], gaps_ms[cut_count:]

    def _went_on(self) -> int:
        return sum(
            record["message"] == GOES_ON
            for name in ("executor", "ingress")
            for record in self._cluster.log_records(name)
        )

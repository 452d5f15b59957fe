"""What the choice of a replica is worth: the real policy over simulated engines.

Run it as `python -m loadtests.routing` from the root of the repository; it takes about a minute and
starts no engine. `core.routing` and `core.fairness` are the product's own; the engines are a model
of vLLM's: continuous batching in steps, chunked prefill, an LRU prefix cache, with the step costs
below. Time is simulated and chance is seeded, so every run prints the same. Latencies are those of
the model: they say which policy is better and by how much, not what a machine will do. Longer than
400 lines because the simulation is of use only as a whole.
"""

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

from serve_app.core.errors import OverloadedError
from serve_app.core.fairness import FairQueue
from serve_app.core.inference import AdmitRequest, Begun, ReplicaLoad, ReplicaNews
from serve_app.core.prefix import BLOCK_TOKENS
from serve_app.core.routing import Fleet, ReplicaReport

# Of SmolLM2-135M on two cores, one engine alone (November 2026): 21 ms for a step with one
# sequence, 64 sequences 300 to 640 tokens/s, and about half a millisecond per prompt token.
STEP_MS = 18.0
PREFILL_TOKEN_MS = 0.5
DECODE_TOKEN_MS = 1.6
STEP_TOKENS_MAX = 2048
SEQUENCES_MAX = 64
KV_TOKENS = 26_000
REPORT_MS = 50
SEED = 20261121


@dataclass(slots=True)
class Job:
    """One request and what became of it; times are ms."""

    name: str
    at_ms: float
    blocks: tuple[int, ...]
    prompt_tokens: int
    answer_tokens: int
    tenant: str = ""
    session: str = ""
    left: int = 0  # of the prompt, to prefill
    made: int = 0
    cached: int = 0
    first_ms: float = 0.0
    end_ms: float = 0.0

    def admit_request(self) -> AdmitRequest:
        """What the router is told."""
        total = self.prompt_tokens + self.answer_tokens
        return AdmitRequest(
            self.name,
            "m",
            total,
            prompt_tokens=self.prompt_tokens,
            prefix=self.blocks,
            tenant=self.tenant,
            session=self.session,
        )


@dataclass
class Engine:
    """One replica: steps, a cache, and its news since the last report."""

    name: str
    slots: int = 0
    waiting: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    cache: "OrderedDict[int, None]" = field(default_factory=OrderedDict)
    is_stepping: bool = False
    arrived: list[str] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    step_count: int = 0

    def take(self, job: Job) -> None:
        """Have a job wait here."""
        self.waiting.append(job)
        self.arrived.append(job.name)

    def plan(self) -> float:
        """Begin a step: fill the batch, and say how long the step takes."""
        budget = STEP_TOKENS_MAX
        decoding = sum(job.left == 0 for job in self.running)
        while self.waiting and len(self.running) < SEQUENCES_MAX:
            job = self.waiting.popleft()
            job.cached = self.cached_tokens(job)
            job.left = job.prompt_tokens - job.cached
            self.running.append(job)
        prefill = 0
        for job in self.running:
            if job.left and budget:
                part = min(job.left, budget)
                job.left -= part
                budget -= part
                prefill += part
        self.step_count += 1
        return STEP_MS + prefill * PREFILL_TOKEN_MS + decoding * DECODE_TOKEN_MS

    def cached_tokens(self, job: Job) -> int:
        """Of a job's prompt, what is cached now."""
        hit = 0
        for block in job.blocks:
            if block not in self.cache:
                break
            hit += 1
        return min(hit * BLOCK_TOKENS, job.prompt_tokens - 1)

    def finish(self, now_ms: float) -> list[Job]:
        """End a step: a token for each whose prompt is done; those that have ended."""
        ended = []
        for job in self.running:
            if job.left:
                continue
            job.made += 1
            if job.made == 1:
                job.first_ms = now_ms
                self.hold(job.blocks)
                told = Begun(job.name, job.session, job.blocks, job.prompt_tokens, job.cached, 0.0)
                self.begun.append(told)
            if job.made >= job.answer_tokens:
                job.end_ms = now_ms
                ended.append(job)
        self.running = [job for job in self.running if job.end_ms == 0.0]
        return ended

    def hold(self, blocks: Sequence[int]) -> None:
        """Keep blocks in the cache, which shares its room with what runs."""
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        busy = sum(job.prompt_tokens + job.made for job in self.running)
        while len(self.cache) > max(0, KV_TOKENS - busy // 2) // BLOCK_TOKENS:
            self.cache.popitem(last=False)

    def report(self, now_ms: float) -> ReplicaReport:
        """What the replica says of itself."""
        open_jobs = [*self.waiting, *self.running]
        prefill = sum(job.left for job in self.running)
        prefill += sum(job.prompt_tokens - self.cached_tokens(job) for job in self.waiting)
        queued = prefill + sum(job.answer_tokens - job.made for job in open_jobs)
        load = ReplicaLoad(
            self.name,
            ("m",),
            "",
            1,
            queued_tokens=queued,
            running_count=len(self.running),
            prefill_tokens=prefill,
            prefill_ms=PREFILL_TOKEN_MS,
            step_ms=STEP_MS,
            kv_tokens=KV_TOKENS,
            open_count=len(open_jobs),
            slots=self.slots,
            step_count=self.step_count,
        )
        news = ReplicaNews(tuple(self.arrived), tuple(self.begun))
        self.arrived.clear()
        self.begun.clear()
        return ReplicaReport(load, "ready", "", int(now_ms), news)


class Events:
    """What happens when; `None` is the reports' turn."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job | Engine | None]] = []
        self._number = 0

    def add(self, at_ms: float, what: Job | Engine | None) -> None:
        """Have something happen."""
        self._number += 1
        heapq.heappush(self._heap, (at_ms, self._number, what))

    def next(self) -> tuple[float, Job | Engine | None]:
        """The next thing to happen, and when."""
        at_ms, _, what = heapq.heappop(self._heap)
        return at_ms, what


Pick = Callable[["Cluster", Job, float], str | None]


@dataclass
class Cluster:
    """Engines, routers and the clock; `pick` is the policy, None from it: no room yet."""

    engines: dict[str, Engine]
    pick: Pick
    chance: random.Random
    routers: list[Fleet] = field(default_factory=lambda: [Fleet()])
    is_sharing: bool = True
    turn: int = 0
    queue: FairQueue | None = None
    parked: dict[str, Job] = field(default_factory=dict)

    def run(
        self, jobs: Sequence[Job], then: Callable[[Job, float], Job | None] | None = None
    ) -> float:
        """Serve jobs, and what `then` makes of one that has ended; when the last ended."""
        events = Events()
        for job in jobs:
            events.add(job.at_ms, job)
        events.add(0.0, None)
        open_count, now_ms = len(jobs), 0.0
        while open_count:
            now_ms, what = events.next()
            if isinstance(what, Job):
                self._arrive(what, now_ms)
            elif isinstance(what, Engine):
                what.is_stepping = False
                for job in what.finish(now_ms):
                    open_count -= 1
                    follower = then(job, now_ms) if then is not None else None
                    if follower is not None:
                        open_count += 1
                        events.add(follower.at_ms, follower)
            else:
                self._report(now_ms)
                events.add(now_ms + REPORT_MS, None)
            self._step(events, now_ms)
        return now_ms

    def _step(self, events: "Events", now_ms: float) -> None:
        for engine in self.engines.values():
            if not engine.is_stepping and (engine.waiting or engine.running):
                engine.is_stepping = True
                events.add(now_ms + engine.plan(), engine)

    def _report(self, now_ms: float) -> None:
        for engine in self.engines.values():
            self._hear(engine.report(now_ms))
        self._serve_parked(now_ms)

    def _arrive(self, job: Job, now_ms: float) -> None:
        is_queueing = self.queue is not None and len(self.queue) > 0
        where = None if is_queueing else self.pick(self, job, now_ms)
        if where is not None:
            if self.queue is not None:
                self.queue.charge(job.tenant, job.prompt_tokens + job.answer_tokens)
            self.engines[where].take(job)
            return
        assert self.queue is not None
        self.parked[job.name] = job
        self.queue.push(job.admit_request(), job.prompt_tokens + job.answer_tokens)

    def _serve_parked(self, now_ms: float) -> None:
        if self.queue is None:
            return

        def can_run(request: AdmitRequest) -> bool:
            job = self.parked[request.request_id]
            where = self.pick(self, job, now_ms)
            if where is not None:
                self.engines[where].take(job)
            return where is not None

        while self.queue.pop(can_run) is not None:
            pass

    def _hear(self, report: ReplicaReport) -> None:
        for index, fleet in enumerate(self.routers):
            own = report
            if not self.is_sharing:
                begun = tuple(
                    one for one in report.news.begun if crc32(one.request_id.encode()) % 2 == index
                )
                own = replace(report, news=replace(report.news, begun=begun))
            fleet.hear(own)


def at_random(cluster: Cluster, _job: Job, _now_ms: float) -> str:
    """Any."""
    return cluster.chance.choice(sorted(cluster.engines))


def in_turn(cluster: Cluster, _job: Job, _now_ms: float) -> str:
    """One after the other."""
    cluster.turn += 1
    return sorted(cluster.engines)[cluster.turn % len(cluster.engines)]


def two_choices(cluster: Cluster, _job: Job, _now_ms: float) -> str:
    """The less loaded of two, by true counts: better news than any router has."""
    pair = cluster.chance.sample(sorted(cluster.engines), 2)
    return min(
        pair,
        key=lambda name: len(cluster.engines[name].waiting) + len(cluster.engines[name].running),
    )


def ours(cluster: Cluster, job: Job, now_ms: float) -> str | None:
    """The product's policy; None where no engine has room."""
    fleet = cluster.routers[crc32(job.name.encode()) % len(cluster.routers)]
    draws = (cluster.chance.random(), cluster.chance.random())
    try:
        return fleet.choose(job.admit_request(), int(now_ms), draws).load.replica_id
    except OverloadedError:
        return None


POLICIES: dict[str, Pick] = {
    "random": at_random,
    "round robin": in_turn,
    "power of two": two_choices,
    "ours": ours,
}


def shared_prefix(count: int, rate: float, chance: random.Random) -> list[Job]:
    """Requests of 32 groups, each group with 1,472 prompt tokens in common, 192 of its own."""
    jobs, at_ms = [], 0.0
    for number in range(count):
        at_ms += chance.expovariate(rate) * 1000
        group = chance.randrange(32)
        blocks = [1000 * (group + 1) + index for index in range(23)]
        blocks += [10**6 + 1000 * number + index for index in range(3)]
        jobs.append(Job(f"g{number}", at_ms, tuple(blocks), 26 * BLOCK_TOKENS, 48))
    return jobs


def multi_turn(count: int, rate: float, chance: random.Random) -> list[Job]:
    """First turns of sessions; `next_turn` makes the others."""
    jobs, at_ms = [], 0.0
    for number in range(count // TURNS):
        at_ms += chance.expovariate(rate / TURNS) * 1000
        blocks = tuple(10**7 + 1000 * number + index for index in range(6))
        name = f"s{number}t0"
        jobs.append(Job(name, at_ms, blocks, 6 * BLOCK_TOKENS, 64, session=f"s{number}"))
    return jobs


TURNS = 6


def next_turn(chance: random.Random) -> Callable[[Job, float], Job | None]:
    """The turn after one that has ended: its blocks, the answer and 128 new tokens."""

    def follow(job: Job, now_ms: float) -> Job | None:
        if not job.session:
            return None
        turn = int(job.name.rpartition("t")[2]) + 1
        if turn == TURNS:
            return None
        first = 10**7 + 1000 * int(job.session[1:])
        blocks = tuple(first + index for index in range(6 + 3 * turn))
        at_ms = now_ms + chance.expovariate(1 / 3000)
        name = f"{job.session}t{turn}"
        return Job(name, at_ms, blocks, len(blocks) * BLOCK_TOKENS, 64, session=job.session)

    return follow


WORK = {"shared prefix": shared_prefix, "multi-turn": multi_turn}


@dataclass(frozen=True, slots=True)
class Row:
    """One arm."""

    hit: float
    ttft_ms: tuple[float, float]
    per_s: float


def run(
    work: str, policy: str, engine_count: int, rate: float, count: int, **options: object
) -> Row:
    """Serve so many requests at so many a second."""
    chance = random.Random(SEED)
    done: list[Job] = []
    follow = next_turn(chance)

    def then(job: Job, now_ms: float) -> Job | None:
        done.append(job)
        return follow(job, now_ms)

    engines = {name: Engine(name) for name in "abcdefgh"[:engine_count]}
    cluster = Cluster(engines, POLICIES[policy], random.Random(SEED + 1), **options)  # type: ignore[arg-type]
    end_ms = cluster.run(WORK[work](count, rate, chance), then)
    late = done[len(done) // 5 :]  # the caches are cold before
    cached = sum(job.cached for job in late)
    waits = sorted(job.first_ms - job.at_ms for job in late)
    return Row(
        cached / sum(job.prompt_tokens for job in late),
        (share(waits, 50), share(waits, 95)),
        len(done) / end_ms * 1000,
    )


def share(ordered: Sequence[float], percent: int) -> float:
    """A percentile, by nearest rank."""
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def by_policy(count: int = 1500) -> None:
    """Hit ratio and time to the first token, below and above what round robin can serve."""
    print("work | engines | load | policy | hit ratio | TTFT p50 ms | p95 ms | done/s")
    for work in WORK:
        for engine_count in (2, 4):
            capacity = run(work, "round robin", engine_count, 10_000.0, count).per_s
            for load in (0.6, 1.2):
                for policy in POLICIES:
                    row = run(work, policy, engine_count, load * capacity, count)
                    p50, p95 = row.ttft_ms
                    print(
                        f"{work} | {engine_count} | {load:.0%} | {policy} | {row.hit:.2f} | "
                        f"{p50:.0f} | {p95:.0f} | {row.per_s:.1f}"
                    )


def two_routers(count: int = 1500) -> None:
    """What several routers cost that do not talk to each other."""
    print("\nwork | routers | hit ratio | TTFT p50 ms | p95 ms")
    for work in WORK:
        rate = 0.6 * run(work, "round robin", 4, 10_000.0, count).per_s
        for name, fleets, is_sharing in (
            ("one", 1, True),
            ("two, by the replicas' reports", 2, True),
            ("two, each by its own requests", 2, False),
        ):
            routers = [Fleet() for _ in range(fleets)]
            row = run(work, "ours", 4, rate, count, routers=routers, is_sharing=is_sharing)
            print(f"{work} | {name} | {row.hit:.3f} | {row.ttft_ms[0]:.0f} | {row.ttft_ms[1]:.0f}")


def fairness() -> None:
    """One heavy and four light tenants at one engine: a plain queue, and the fair one."""
    print("\nadmission | heavy tokens/s | light tokens/s each | Jain index | light TTFT p95 ms")
    for name, queue, slots in (
        ("none: the engine's own queue", None, 0),
        *(
            (f"fair, {slots} slots", FairQueue(100_000, 100_000), slots)
            for slots in (SEQUENCES_MAX // 2, SEQUENCES_MAX, SEQUENCES_MAX * 2)
        ),
    ):
        chance = random.Random(SEED)
        demand = [("heavy", 40.0, 2400), *((f"light{n}", 0.3, 36) for n in range(4))]
        jobs = []
        for tenant, rate, count in demand:
            at_ms = 0.0
            for number in range(count):
                at_ms += chance.expovariate(rate) * 1000
                base = crc32(f"{tenant}{number}".encode()) * 1000
                blocks = tuple(base + index for index in range(4))
                jobs.append(Job(f"{tenant}-{number}", at_ms, blocks, 256, 64, tenant=tenant))
        engines = {"a": Engine("a", slots)}
        Cluster(engines, ours, random.Random(SEED), queue=queue).run(jobs)
        window_ms = 60_000.0  # while all of them ask
        served = dict.fromkeys(("heavy", *(f"light{n}" for n in range(4))), 0.0)
        wanted = dict(served)
        for job in jobs:
            tokens = job.prompt_tokens + job.answer_tokens
            wanted[job.tenant] += tokens * (job.at_ms < window_ms)
            served[job.tenant] += tokens * (job.end_ms < window_ms)
        fair = max_min(wanted, sum(served.values()))
        ratios = [served[tenant] / fair[tenant] for tenant in served]
        jain = sum(ratios) ** 2 / (len(ratios) * sum(ratio**2 for ratio in ratios))
        waits = sorted(j.first_ms - j.at_ms for j in jobs if j.tenant != "heavy")
        light = (sum(served.values()) - served["heavy"]) / 4
        print(
            f"{name} | {served['heavy'] / 60:.0f} | {light / 60:.0f} | {jain:.3f} | "
            f"{share(waits, 95):.0f}"
        )


def max_min(wanted: dict[str, float], total: float) -> dict[str, float]:
    """The max-min fair division of what was served: nobody gets more than it asked for."""
    fair: dict[str, float] = {}
    left = total
    for count, tenant in zip(
        range(len(wanted), 0, -1), sorted(wanted, key=wanted.__getitem__), strict=True
    ):
        fair[tenant] = min(wanted[tenant], left / count)
        left -= fair[tenant]
    return fair


if __name__ == "__main__":
    by_policy()
    two_routers()
    fairness()

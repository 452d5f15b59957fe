"""The metrics of all processes on one page: each publishes its own, whoever is asked joins them.

Owns the published pages and the label that tells processes apart. One page for the cluster spares
an operator from finding each process; what is asked is live, the others are PUBLISH_S old at most.
Invariant: a process that is gone is shown for FRESH_MS and no longer.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson
from prometheus_client import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serve_app.adapters.metrics import own_page
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_config import CONFIG_KEY
from serve_app.core.errors import ServeAppError
from serve_app.ports import Clock

PUBLISH_S = 5.0
FRESH_MS = 30_000
STORE_WAIT_S = 2.0  # calls to the store are repeated for longer than a scraper waits
_PAGES = f"{CONFIG_KEY}:metrics"


class RedisMetrics:
    """See `ports.MetricsPage`.

    Args:
        process: what stands in the label `process`: the deployment and what makes it unique.
    """

    def __init__(
        self, calls: RedisCalls, clock: Clock, process: str, *, partition_count: int
    ) -> None:
        self._calls = calls
        self._clock = clock
        self._process = process
        self._partition_count = partition_count

    async def run(self) -> None:
        """Publish until cancelled; a store that is away for a while loses a page, no more."""
        while True:
            page = orjson.dumps([self._clock.now_ms(), own_page()])
            try:
                await self._calls.call("HSET", _PAGES, self._process, page)
            except ServeAppError:
                await self._clock.sleep(PUBLISH_S)
            await self._clock.sleep(PUBLISH_S)

    async def page(self) -> bytes:
        """See `ports.MetricsPage`."""
        pages = {self._process: own_page()}
        try:
            async with asyncio.timeout(STORE_WAIT_S):
                pages |= await self._others()
                depths = _Depths(
                    ready=await self._sum("GET", "depth"), dead=await self._sum("XLEN", "dead")
                )
        except (ServeAppError, TimeoutError):
            return generate_latest(_Pages(pages, None))
        return generate_latest(_Pages(pages, depths))

    async def _others(self) -> dict[str, str]:
        pages: dict[str, str] = {}
        now_ms = self._clock.now_ms()
        for name, data in (await self._calls.call("HGETALL", _PAGES)).items():
            at_ms, page = orjson.loads(data)
            process = name.decode()
            if now_ms - at_ms > FRESH_MS:
                await self._calls.call("HDEL", _PAGES, process)
            elif process != self._process:
                pages[process] = page
        return pages

    async def _sum(self, command: str, name: str) -> int:
        """What a key says of its length, over all partitions."""
        lengths = await asyncio.gather(
            *(
                self._calls.call(command, f"ip:{{{partition}}}:{name}")
                for partition in range(self._partition_count)
            )
        )
        return sum(int(length or 0) for length in lengths)


@dataclass(frozen=True, slots=True)
class _Depths:
    """How many wait in the store, and how many it gave up."""

    ready: int
    dead: int


class _Pages(Collector):
    """Pages of several processes as one registry: each family once, a label for the process."""

    def __init__(self, pages: dict[str, str], depths: _Depths | None) -> None:
        self._pages = pages
        self._depths = depths

    def collect(self) -> Iterator[Metric]:
        """All families."""
        up = GaugeMetricFamily("inferpipe_store_up", "Whether the store answers.")
        up.add_metric([], float(self._depths is not None))
        yield up
        if self._depths is not None:
            ready = GaugeMetricFamily(
                "inferpipe_ready_executions", "Executions that wait for a worker."
            )
            ready.add_metric([], self._depths.ready)
            yield ready
            dead = GaugeMetricFamily(
                "inferpipe_dead_messages", "Messages between partitions that were given up."
            )
            dead.add_metric([], self._depths.dead)
            yield dead
        yield from self._joined()

    def _joined(self) -> Iterable[Metric]:
        joined: dict[str, Metric] = {}
        for process, page in sorted(self._pages.items()):
            for family in text_string_to_metric_families(page):
                kept = joined.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "process": process}
                    kept.add_sample(sample.name, labels, sample.value)
        return joined.values()

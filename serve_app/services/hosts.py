"""Hosts: the model replicas, as those who choose one for themselves see them.

Owns which replicas are shown. Reads the replicas' own reports at each question: hosts are asked
for seldom, and a copy would be older. Invariant: a replica that has not reported lately is shown as
lost, and none is shown for ever.
"""

from dataclasses import replace

from serve_app.core.errors import ModelNotAvailableError
from serve_app.core.inference import AdmitRequest, Placement
from serve_app.core.routing import REPORT_TTL_MS, Fleet, ReplicaReport
from serve_app.ports import Clock, Entropy, ReplicaRegistry

SHOWN_MS = 60_000  # how long a replica that fell silent, or failed to start, is shown
START_SHOWN_MS = 600_000  # one that starts reports once and then loads its model
LOST = "lost"


class Hosts:
    """The replicas of one registry."""

    def __init__(self, registry: ReplicaRegistry, clock: Clock, entropy: Entropy) -> None:
        self._registry = registry
        self._clock = clock
        self._entropy = entropy

    async def all(self) -> tuple[ReplicaReport, ...]:
        """The hosts, ready ones first, then by id; `phase` may be `lost` here."""
        now_ms = self._clock.now_ms()
        shown = [
            _aged(report, now_ms)
            for report in await self._registry.latest()
            if now_ms - report.at_ms < _shown_ms(report)
        ]
        return tuple(sorted(shown, key=_ready_first))

    async def select(self, model: str, placement: Placement) -> ReplicaReport:
        """The host that a short request would do best on now, by the router's own policy.

        Raises:
            ModelNotAvailableError: no replica serves the model.
            NoHostsAvailableError: none that serves it satisfies the conditions; it says which.
        """
        fleet = Fleet()
        for report in await self._registry.latest():
            fleet.hear(report)
        wanted = AdmitRequest("", model, token_count=0, placement=placement)
        draws = self._entropy.uniform(), self._entropy.uniform()
        choice = fleet.rank(wanted, self._clock.now_ms(), draws)
        return fleet.reports[choice.load.replica_id]

    async def check_model(self, model: str) -> None:
        """Refuse a model that nobody serves; before any replica has reported, any may come.

        Raises:
            ModelNotAvailableError: naming those there are.
        """
        known = {name for report in await self._registry.latest() for name in report.load.models}
        if known and model not in known:
            names = ", ".join(sorted(known))
            raise ModelNotAvailableError(f"no model {model!r}; available: {names}")


def _shown_ms(report: ReplicaReport) -> int:
    return START_SHOWN_MS if report.phase == "starting" else SHOWN_MS


def _aged(report: ReplicaReport, now_ms: int) -> ReplicaReport:
    is_silent = now_ms - report.at_ms >= REPORT_TTL_MS
    is_lost = is_silent and report.phase in {"ready", "draining"}  # both report while they live
    return replace(report, phase=LOST) if is_lost else report


def _ready_first(report: ReplicaReport) -> tuple[bool, str]:
    return report.phase != "ready", report.load.replica_id

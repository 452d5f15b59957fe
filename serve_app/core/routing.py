"""Which replica takes a request: a pure choice over reports and reservations.

Owns the fleet's soft state and the policy. Knows no handle, no clock. Invariant: everything here
is rebuilt from the replicas' own reports; a router that starts empty is right a second later.
"""

from dataclasses import dataclass, field

from serve_app.core.errors import ModelNotAvailableError, NoHostsAvailableError
from serve_app.core.inference import AdmitRequest, ReplicaLoad

REPORT_TTL_MS = 3_000  # a replica that has not reported for so long is not offered
RESERVATION_MS = 1_000  # by then the replica's own report counts the request


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica says of itself.

    Args:
        phase: starting, ready, draining or failed.
        detail: why it failed; for people.
    """

    load: ReplicaLoad
    phase: str
    detail: str
    at_ms: int


@dataclass(slots=True)
class Fleet:
    """The latest report of each replica, and what was sent there since."""

    reports: dict[str, ReplicaReport] = field(default_factory=dict)
    reserved: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def hear(self, report: ReplicaReport) -> None:
        """Take a report; it replaces the replica's last one."""
        self.reports[report.load.replica_id] = report

    def choose(self, request: AdmitRequest, now_ms: int) -> ReplicaLoad:
        """Return the replica with the fewest queued tokens, and reserve the request's there.

        Raises:
            ModelNotAvailableError: no report, however old, names the model.
            NoHostsAvailableError: none that serves it is ready, or none has reported at all: a
                router that has just started does not know which models there are.
        """
        serving = [r for r in self.reports.values() if _serves(r.load, request.model)]
        if not serving:
            known = sorted({model for r in self.reports.values() for model in r.load.models})
            if known:
                names = ", ".join(known)
                raise ModelNotAvailableError(f"no model {request.model!r}; available: {names}")
            raise NoHostsAvailableError("no model replica has reported yet")
        ready = [r.load for r in serving if self._is_ready(r, request, now_ms)]
        if not ready:
            raise NoHostsAvailableError(f"no replica of {request.model or 'the model'} is ready")
        chosen = min(ready, key=lambda load: self._queued_tokens(load, now_ms))
        entry = (now_ms + RESERVATION_MS, request.token_count)
        self.reserved.setdefault(chosen.replica_id, []).append(entry)
        return chosen

    def live(self, now_ms: int) -> tuple[ReplicaReport, ...]:
        """Reports that are young enough to be believed."""
        return tuple(r for r in self.reports.values() if now_ms - r.at_ms < REPORT_TTL_MS)

    def _is_ready(self, report: ReplicaReport, request: AdmitRequest, now_ms: int) -> bool:
        is_young = now_ms - report.at_ms < REPORT_TTL_MS
        is_open = report.phase == "ready" and report.load.replica_id not in request.excluded
        return is_young and is_open

    def _queued_tokens(self, load: ReplicaLoad, now_ms: int) -> int:
        kept = [entry for entry in self.reserved.get(load.replica_id, ()) if entry[0] > now_ms]
        self.reserved[load.replica_id] = kept
        return load.queued_tokens + sum(tokens for _, tokens in kept)


def _serves(load: ReplicaLoad, model: str) -> bool:
    return not model or model in load.models

"""Whether a replica that answers is also well: by its engine's steps and what callers lost there.

Owns one replica's record of both. Knows no clock. A replica is *stalled* when requests run and its
engine has made no step for long: engines hang while their ports still answer. It is *ejected* when
callers lost requests there several times in a row, for a while that doubles; then it is *on trial*
with one request, and that one's first token brings it back (a circuit breaker, half-open).
Invariant: an ejection ends by itself; only reports of a living engine end a stall.
"""

from dataclasses import dataclass

from serve_app.core.inference import ReplicaLoad

STALL_MS = 20_000  # a step of a long prefill takes seconds on a CPU, and is no illness
LOSSES_MAX = 3  # in a row, of different requests
EJECTION_MIN_MS = 1_000
EJECTION_MAX_MS = 30_000
TRIAL_MS = 10_000  # a trial request that brought nothing by then counts as none


@dataclass(slots=True)
class Breaker:
    """What is held against one replica."""

    step_count: int = -1
    advanced_at_ms: int = 0
    losses: int = 0
    last_lost: str = ""
    ejection_ms: int = 0
    ejected_until_ms: int = 0
    trial_until_ms: int = 0

    def hear(self, load: ReplicaLoad, now_ms: int) -> None:
        """Take a report."""
        if load.running_count == 0 or load.step_count != self.step_count:
            self.advanced_at_ms = now_ms
        self.step_count = load.step_count

    def began(self) -> None:
        """A request got its first token: all is forgiven."""
        self.losses = self.ejection_ms = self.ejected_until_ms = self.trial_until_ms = 0

    def lost(self, request_id: str, now_ms: int) -> None:
        """A caller lost a request here; told twice, it counts once."""
        if request_id == self.last_lost:
            return
        self.last_lost = request_id
        self.losses += 1
        if self.losses >= LOSSES_MAX and now_ms >= self.ejected_until_ms:
            self.ejection_ms = min(max(2 * self.ejection_ms, EJECTION_MIN_MS), EJECTION_MAX_MS)
            self.ejected_until_ms = now_ms + self.ejection_ms
            self.trial_until_ms = 0

    def chosen(self, now_ms: int) -> None:
        """A request goes there; after an ejection it is the trial."""
        if self.ejection_ms:
            self.trial_until_ms = now_ms + TRIAL_MS

    def is_stalled(self, now_ms: int) -> bool:
        """Whether its engine stands still under work."""
        return self.step_count >= 0 and now_ms - self.advanced_at_ms >= STALL_MS

    def is_shunned(self, now_ms: int) -> bool:
        """Whether it is ejected, or its trial is under way."""
        return bool(self.ejection_ms) and (
            now_ms < self.ejected_until_ms or now_ms < self.trial_until_ms
        )

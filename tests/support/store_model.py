"""What the store must do, in forty lines of dictionaries: the reference for the stateful test."""

from dataclasses import dataclass, field

from serve_app.core.execution import Event, Execution


@dataclass
class Journal:
    """One execution as the model has it."""

    execution: Execution
    entries: list[tuple[str, Event]]
    owner: str = ""
    is_ready: bool = False
    timer_ms: int | None = None


@dataclass
class StoreModel:
    """One partition: journals, live workers, and messages delivered."""

    capacity: int
    journals: dict[str, Journal] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    outbox: list[str] = field(default_factory=list)
    delivered: set[str] = field(default_factory=set)

    def owned_by(self, worker: str) -> set[str]:
        """Execution ids whose token is this worker's."""
        return {
            eid for eid, journal in self.journals.items() if journal.owner.startswith(worker + "/")
        }

    def least_owned(self) -> set[str]:
        """The workers that work may go to: alive, with room, and none has less."""
        counts = {worker: len(self.owned_by(worker)) for worker in self.live}
        room = {worker: count for worker, count in counts.items() if count < self.capacity}
        least = min(room.values(), default=0)
        return {worker for worker, count in room.items() if count == least}

    def assign(self, eid: str, token: str, *, is_new: bool = False) -> None:
        """Take over the store's choice after checking that it was allowed.

        What is new goes behind whatever waits, room or not.
        """
        journal = self.journals[eid]
        is_behind = is_new and any(one.is_ready for one in self.journals.values())
        allowed = set() if is_behind else self.least_owned()
        worker = token.rpartition("/")[0]
        assert (worker in allowed) if allowed else token == "", (token, allowed)
        journal.owner, journal.is_ready = token, token == ""

    def release(self, eid: str) -> None:
        """Nobody owns it."""
        self.journals[eid].owner = ""

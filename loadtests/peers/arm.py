"""What an arm of the comparison is: a service that can be asked, counted and hurt."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loadtests.http_client import Connection
from loadtests.peers.work import Work

Request = tuple[str, str, bytes]  # method, path, body


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the table: a peer in one configuration.

    Args:
        folder: where its steps write what they did.
        cancel: the request that cancels, by the work and by what `start` was answered.
        lose_worker: SIGKILL whoever runs the steps, and start it again where nobody else would.
        done: how many executions have ended so far; None: those whose last step has.
        ended_well: in the answer of an execution that did; empty: the status says it.
        batch: executions of one start/done measurement: what the peer can do in some seconds.
        takes_time: whether its steps can take 10 ms.
        is_watched: whether its steps say when they start and stop, to be lost and cancelled.
    """

    name: str
    durability: str
    folder: Path
    connect: Callable[[], Connection]
    run: Callable[[Work], Request]
    start: Callable[[Work], Request]
    cancel: Callable[[Work, bytes], Request]
    lose_worker: Callable[[], None]
    cpu_s: Callable[[], float]
    connect_to_cancel: Callable[[], Connection] | None = None
    done: Callable[[], int] | None = None
    ended_well: bytes = b""
    batch: int = 64 * 46
    takes_time: bool = True
    is_watched: bool = True

"""The three steps, the same for every peer, and what they leave behind for the driver to read.

Runs in the peers' own environment, so it knows the standard library alone. A step that ends last
writes one byte to `ends`; those of a watched execution write a line to `steps` when they start, end
and are stopped, with the machine's monotonic time, which all processes share. Both files are
appended to with one write each, so several processes may do it at once.
"""

import asyncio
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

STEPS = (1, 2, 3)
LAST = STEPS[-1]
FOLDER_VARIABLE = "PEERS_FOLDER"  # of the two files; the driver sets it for whoever runs steps


@dataclass(frozen=True, slots=True)
class Work:
    """What one execution does.

    Args:
        id: of a watched execution; empty: nobody watches its steps.
        ms: how long each step takes.
    """

    ms: int = 0
    id: str = ""

    def as_json(self) -> dict[str, int | str]:
        """The members."""
        return asdict(self)


class Notes:
    """The two files, opened for appending."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        self._ends = os.open(folder / "ends", flags, 0o666)
        self._steps = os.open(folder / "steps", flags, 0o666)

    def ended(self, step: int) -> None:
        """A step is done."""
        if step == LAST:
            os.write(self._ends, b".")

    def note(self, what: str, work: Work, step: int) -> None:
        """Tell of a watched execution's step: `started`, `ended` or `stopped`."""
        if work.id:
            os.write(self._steps, f"{what} {work.id} {step} {time.monotonic()}\n".encode())


def notes_here() -> Notes:
    """The files of the folder that the driver named."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    return Notes(folder)


async def run_step(notes: Notes, work: Work, step: int) -> int:
    """One step: waits, and says so where it is watched."""
    notes.note("started", work, step)
    try:
        if work.ms:
            await asyncio.sleep(work.ms / 1000)
    except asyncio.CancelledError:
        notes.note("stopped", work, step)
        raise
    notes.note("ended", work, step)
    notes.ended(step)
    return step

"""An engine's number among those of its machine.

Owns the lock files that numbers are held by. Invariant: no two living engines of a cluster have one
number on one machine, and a number is free as soon as its process is gone, kill -9 included: the
kernel drops its locks. (Ray's rank of a replica is no such number: a replacement may get its own
before the dead one's is free.)
"""

import fcntl
import os
import tempfile
from pathlib import Path

_SLOTS_MAX = 1024


class EngineSlot:
    """The lowest free number, held until `close` or the end of the process.

    Args:
        folder: the machine's own; none: one below its temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir()) / f"inferpipe-engines-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for index in range(_SLOTS_MAX):
            handle = os.open(folder / f"{index}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            self.index = index
            self._handle = handle
            return
        raise OSError(f"{_SLOTS_MAX} engines on one machine already")

    def close(self) -> None:
        """Free the number."""
        os.close(self._handle)

"""What the store takes: how large, how many, for how long.

Owns the defaults; the settings name the same bounds.
"""

from dataclasses import dataclass

from serve_app.adapters.payloads import INLINE_BYTES

DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What may be large or many, and where it ends.

    Args:
        inline_bytes: a stored record above it keeps its large members apart.
        input_bytes: an execution's input, as JSON.
        kept_max: executions of one workspace; the oldest that ended goes first.
        page_bytes: payloads read with one page of a journal; the page ends there.
        events_kept_max: of one workspace, for `events_retention_ms`.
    """

    inline_bytes: int = INLINE_BYTES
    input_bytes: int = 8 << 20
    kept_max: int = 1_000_000
    page_bytes: int = 16 << 20
    events_kept_max: int = 16_000
    events_retention_ms: int = DAY_MS


DEFAULT_LIMITS = StoreLimits()

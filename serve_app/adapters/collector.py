"""What Python's garbage collector looks at in a process that serves for days.

Owns its settings. Ray, FastAPI and vLLM's serving code leave about a million objects that never go,
and every full collection walks them all, with the event loop held up meanwhile: under load that was
half of an ingress's CPU, in stalls of 0.1 to 0.6 s (py-spy, two busy cores, 2026-11-21). Invariant:
what is set aside is still freed when its last reference goes; only cycles among it stay for ever.
"""

import gc

# Objects made and not freed between two looks at the youngest. Python's own 700 is a few requests.
YOUNG_MAX = 10_000


def set_aside_what_stays() -> None:
    """Exempt all that exists now; called where a process is ready, and after a large import.

    It collects nothing first: that would hold up the loop for what is a few megabytes at most.
    """
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, *gc.get_threshold()[1:])

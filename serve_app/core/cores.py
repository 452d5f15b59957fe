"""Which cores an engine computes on: engines of one machine must not share one.

Owns the division. Knows no process and no operating system. Two engines on one core take turns of
whole scheduler slices, so that each step of either waits for the other's; vLLM itself, which knows
of no other engine, binds every one to the same cores.
"""

from collections.abc import Sequence


def cores_of(
    cores: Sequence[int], engine_index: int, engine_count: int, threads: int = 0
) -> tuple[int, ...]:
    """The cores of one engine of several; empty: vLLM's own choice, all of them but one.

    Args:
        cores: those of the machine that may be used, one or more.
        engine_index: 0 for the first engine of this machine; past `engine_count` it begins anew.
        engine_count: engines that this machine is to have.
        threads: that an engine is to have; 0: as many as leave each its own cores, and one core
            to all other processes, but one at least.
    """
    if engine_count <= 1 and not threads:
        return ()
    count = min(threads or max(1, (len(cores) - 1) // engine_count), len(cores))
    first = engine_index * count
    return tuple(sorted({cores[(first + index) % len(cores)] for index in range(count)}))

"""What an execution costs beside a bare route: `test-echo`, synchronously, against `/v1/health`.

Run it as `python -m loadtests.overhead` from the root of the repository; it takes about 100 s. Both
arms go through the same proxy, application and client; they take turns, and their order changes
each round, so that a slow moment of the machine meets both. CPU counts the service's processes,
the store included, less what they spend with nothing to do.
"""

import argparse
import statistics
from dataclasses import dataclass, field

import uvloop

from loadtests.http_client import Timings, closed_loop
from loadtests.service import (
    CallCpu,
    CpuMeter,
    Target,
    add_target_arguments,
    execute_body,
    given_or_tiny,
    machine,
    middle_parts,
    spread,
)

CONCURRENCIES = (1, 32)
ROUNDS = 5
SECONDS = 1.5
WARM_SECONDS = 1.0
HEALTH, ECHO = "GET /v1/health", "test-echo"
REQUESTS = {
    HEALTH: ("GET", "/v1/health", b""),
    ECHO: ("POST", "/v1/execute", execute_body("test-echo", {"message": "hello world"})),
}


@dataclass(slots=True)
class Arm:
    """All rounds of one route at one concurrency."""

    timings: list[Timings] = field(default_factory=list)
    cpu: list[CallCpu] = field(default_factory=list)

    @property
    def cpu_ms(self) -> list[float]:
        """CPU ms per request of each round."""
        return [call.net_ms for call in self.cpu]

    def values(self, name: str) -> list[float]:
        """One figure of each round."""
        return [getattr(timing, name) for timing in self.timings]

    def median(self, name: str) -> float:
        """The middle round's figure."""
        return statistics.median(self.values(name))


async def run_round(target: Target, route: str, concurrency: int, seconds: float) -> Timings:
    """One closed loop over new connections."""
    connections = [target.connection() for _ in range(concurrency)]

    async def call(caller: int) -> bool:
        status, _ = await connections[caller].request(*REQUESTS[route])
        return status == 200

    try:
        return await closed_loop(concurrency, seconds, call)
    finally:
        for connection in connections:
            connection.close()


async def measure(target: Target, meter: CpuMeter) -> dict[tuple[int, str], Arm]:
    """All arms, taking turns."""
    arms = {(c, route): Arm() for c in CONCURRENCIES for route in REQUESTS}
    for route in REQUESTS:
        await run_round(target, route, max(CONCURRENCIES), WARM_SECONDS)
    for number in range(ROUNDS):
        for concurrency in CONCURRENCIES:
            for route in sorted(REQUESTS, reverse=bool(number % 2)):
                meter.start()
                timings = await run_round(target, route, concurrency, SECONDS)
                arm = arms[concurrency, route]
                arm.timings.append(timings)
                arm.cpu.append(meter.per_call_ms(timings.count))
    return arms


def print_table(arms: dict[tuple[int, str], Arm]) -> None:
    """Each arm, then what the echo costs beside the bare route."""
    print(f"median of {ROUNDS} rounds of {SECONDS} s (range); CPU: ms per request, whole service\n")
    print("| callers | route | p50 ms | p99 ms | per s | CPU ms | errors |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (concurrency, route), arm in arms.items():
        errors = sum(timing.error_count for timing in arm.timings)
        cells = [spread(arm.values(name)) for name in ("p50_ms", "p99_ms")]
        cells += [f"{arm.median('per_second'):.0f}", spread(arm.cpu_ms), str(errors)]
        print(f"| {concurrency} | {route} | {' | '.join(cells)} |")
    for concurrency in CONCURRENCIES:
        bare, echo = arms[concurrency, HEALTH], arms[concurrency, ECHO]
        pairs = {n[:3]: (bare.median(n), echo.median(n)) for n in ("p50_ms", "p99_ms")}
        pairs["CPU"] = (statistics.median(bare.cpu_ms), statistics.median(echo.cpu_ms))
        shown = [f"{name} +{b - a:.2f} ms (x{b / a:.1f})" for name, (a, b) in pairs.items() if a]
        print(f"\ntest-echo beside the bare route, {concurrency} callers: {', '.join(shown)}")
        print("  CPU ms of one echo:", middle_parts(echo.cpu))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_target_arguments(parser)
    with given_or_tiny(parser.parse_args()) as target:
        meter = CpuMeter(target)
        print(f"{machine()}\n{meter.idle}")
        print_table(uvloop.run(measure(target, meter)))


if __name__ == "__main__":
    main()

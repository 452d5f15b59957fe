"""What the whole service takes with the bundled SmolLM2: memory, and time to its first token.

Run it as `python -m loadtests.footprint` from the root of the repository; it takes about 90 s. The
start is warm when the converted weights lie in `--models` (what an earlier `inferpipe up` left
there); they are linked, not copied. PSS counts a page shared by n processes as 1/n in each, so its
sum is what the service really holds; the sum of RSS counts shared pages again and again.
"""

import argparse
import asyncio
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtests.service import Target, execute_body, machine, part_of, target_of
from tests.e2e.conftest import start_service, stop_service

MIB = 1 << 20
SETTLE_S = 5.0
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}


@dataclass(slots=True)
class Part:
    """Processes of one part of the service, in MiB."""

    processes: int = 0
    pss: float = 0.0
    rss: float = 0.0


def memory(target: Target) -> dict[str, Part]:
    """Memory by part, dearest first."""
    parts: defaultdict[str, Part] = defaultdict(Part)
    for process in target.processes():
        try:
            used = process.memory_full_info()
            part = parts[part_of(process)]
        except psutil.NoSuchProcess:
            continue
        part.processes += 1
        part.pss += used.pss / MIB
        part.rss += used.rss / MIB
    return dict(sorted(parts.items(), key=lambda item: -item[1].pss))


async def ask(target: Target) -> tuple[float, float]:
    """When the first token of a streamed answer came, and when its end did (`perf_counter`)."""
    first_s = 0.0

    def received(part: bytes) -> None:
        nonlocal first_s
        if not first_s and b"event: chunk" in part:
            first_s = time.perf_counter()

    connection = target.connection()
    body = execute_body("chat-assistant", QUESTION)
    status, raw = await connection.stream("/v1/execute/stream", body, received)
    connection.close()
    assert status == 200, raw
    assert b"execution.completed" in raw, raw
    return first_s, time.perf_counter()


def print_memory(title: str, parts: dict[str, Part]) -> None:
    """The table and its sum."""
    print(f"\n{title}\n\n| part | processes | PSS MiB | RSS MiB |\n| --- | --- | --- | --- |")
    total = Part()
    for name, part in parts.items():
        print(f"| {name} | {part.processes} | {part.pss:.0f} | {part.rss:.0f} |")
        total.processes += part.processes
        total.pss += part.pss
        total.rss += part.rss
    print(f"| all | {total.processes} | {total.pss:.0f} | {total.rss:.0f} |")


def main() -> None:
    """Start, ask, look, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models",
        type=Path,
        default=Path.home() / ".inferpipe" / "models",
        help="where converted weights lie (default: ~/.inferpipe/models)",
    )
    models = parser.parse_args().models.resolve()
    if not models.is_dir():
        parser.error(f"{models} does not exist: run `inferpipe up` once, or name another --models")
    with tempfile.TemporaryDirectory(prefix="ip-load-") as base:
        data_dir = Path(base) / "data"
        data_dir.mkdir()
        (data_dir / "models").symlink_to(models)
        begin = time.perf_counter()
        service = start_service(data_dir, None)
        try:
            ready_s = time.perf_counter() - begin
            target = target_of(service)
            asked_s = time.perf_counter()
            first_s, _ = asyncio.run(ask(target))
            print(machine())
            print(
                f"ready after {ready_s:.1f} s, first streamed token after {first_s - begin:.1f} s"
            )
            print(f"(asked {asked_s - begin:.1f} s after the start)")
            time.sleep(SETTLE_S)
            print_memory("after the first answer, idle", memory(target))
        finally:
            stop_service(service)


if __name__ == "__main__":
    main()

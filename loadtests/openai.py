"""Our chat completions beside vLLM's own server and Ray Serve LLM: tokens a second, and the first.

Run it as `python -m loadtests.openai` from the root of the repository; it takes about 200 s. All
arms serve the same model with the same engine settings and run at the same time, but only one is
asked at a time, in turns; so what the others' idle processes take, each arm loses. `vllm` is
`python -m vllm.entrypoints.openai.api_server` as vLLM ships it, without its access log and its
statistics, which our engine leaves out too. `ray` is `loadtests.ray_serve_llm`; `--arms
vllm,inferpipe` leaves it out. `--model smollm2` measures with the bundled real model, where the
engine's own time covers much of the cost of serving.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import orjson
import psutil
import uvloop

from loadtests.http_client import Connection, closed_loop, percentile
from loadtests.service import Target, machine, spread
from loadtests.tokens import without_chunk_borders
from serve_app.adapters.model_weights import prepare_default_model
from tests.e2e.conftest import API_KEY, free_port, start_service, stop_service
from tests.support.tiny_model import make_tiny_model

STREAM_COUNTS = (1, 16, 64)
ROUNDS = 3
# Before each: vLLM's processes go on spinning for a second after their last message.
REST_S = 2.0
SECONDS = {"tiny": 3.0, "smollm2": 5.0}
MAX_TOKENS = {"tiny": 128, "smollm2": 32}
NAME = "bench"
CONTEXT = 2048
READY_WITHIN_S = 150
RAY = "loadtests.ray_serve_llm"
ARMS = ("vllm", "inferpipe", "ray")


@dataclass(slots=True)
class Arm:
    """All rounds of one server at one stream count."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    asked_count: int = 0
    error_count: int = 0
    cpu_us: list[float] = field(default_factory=list)
    parts_us: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class Server:
    """One of the two: where it listens, and what its processes spend."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self._target = Target(f"http://127.0.0.1:{port}", API_KEY, psutil.Process(pid))
        self._before: dict[str, float] = {}

    def start(self) -> None:
        """Begin a span."""
        self._before = dict(self._target.cpu_s())

    def per_token_us(self, tokens: int) -> dict[str, float]:
        """CPU of the span by part, for each token."""
        after = self._target.cpu_s()
        return {
            part: 1e6 * (s - self._before.get(part, 0.0)) / max(1, tokens)
            for part, s in after.items()
        }


@contextmanager
def peer(command: list[str], port: int, log: Path) -> Iterator[tuple[Server, Callable[[], None]]]:
    """A peer's server, and what waits until it answers: all servers start at the same time."""
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def wait() -> None:
        give_up = time.monotonic() + READY_WITHIN_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(log.read_text(errors="replace")[-3000:])
            time.sleep(0.2)

    try:
        yield Server(port, process.pid), wait
    finally:
        assert process.stdin is not None
        process.stdin.close()  # which ends Ray Serve LLM in good order
        if command[0] != RAY:
            process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def peer_command(way: str, model: Path, port: int, base: Path) -> list[str]:
    """The module and arguments that start a peer on the model."""
    if way == "ray":
        (base / "ray").mkdir()
        return [RAY, str(model), NAME, str(port), str(CONTEXT), str(base / "ray")]
    return [
        "vllm.entrypoints.openai.api_server",
        *("--model", str(model), "--served-model-name", NAME, "--host", "127.0.0.1"),
        *("--port", str(port), "--enforce-eager", "--max-num-seqs", "64"),
        *("--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", str(2**30)),
        *("--scheduling-policy", "priority", "--disable-log-stats"),
        "--disable-uvicorn-access-log",
    ]


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False


async def run_round(arm: Arm, server: Server, streams: int, kind: str, seconds: float) -> None:
    """Streams without pause, each question a new one, so that no prompt is cached whole."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    connections = [Connection("127.0.0.1", server.port, headers) for _ in range(streams)]
    tokens = asked = 0
    server.start()
    begin = time.perf_counter()

    async def call(caller: int) -> bool:
        nonlocal tokens, asked
        asked += 1
        started = time.perf_counter()
        is_first = True

        def received(part: bytes) -> None:
            nonlocal is_first
            # The first event has the role alone; the text is in the second.
            if is_first and b'"delta":{"content":"' in part:
                is_first = False
                arm.first_s.append(time.perf_counter() - started)

        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": f"{asked} {caller} {started}: tell me more"}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS[kind],
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        status, raw = await connections[caller].stream(
            "/v1/chat/completions", orjson.dumps(body), received
        )
        count = completion_tokens(raw) if status == 200 else 0
        tokens += count
        return count == MAX_TOKENS[kind]

    try:
        timings = await closed_loop(streams, seconds, call)
    finally:
        for connection in connections:
            connection.close()
    arm.tokens_per_s.append(tokens / (time.perf_counter() - begin))
    spent = server.per_token_us(tokens)
    arm.cpu_us.append(sum(spent.values()))
    for part, cpu_us in spent.items():
        arm.parts_us[part].append(cpu_us)
    arm.asked_count += asked
    arm.error_count += timings.error_count


def completion_tokens(raw: bytes) -> int:
    """The count in the stream's last event; 0 when there is none."""
    events = without_chunk_borders(raw).split(b"\n\n")
    counted = [event for event in events if b'"completion_tokens":' in event]
    if not counted or b"data: [DONE]" not in events:
        return 0
    usage = orjson.loads(counted[-1].removeprefix(b"data: "))["usage"]
    return int(usage["completion_tokens"])


async def measure(servers: dict[str, Server], kind: str) -> dict[tuple[int, str], Arm]:
    """All arms, taking turns."""
    arms = {(count, way): Arm() for count in STREAM_COUNTS for way in servers}
    for server in servers.values():  # warm: code paths, and the engine's batch sizes
        for count in STREAM_COUNTS:
            await run_round(Arm(), server, count, kind, 1.0)
    for number in range(ROUNDS):
        for count in STREAM_COUNTS:
            for way in sorted(servers, reverse=bool(number % 2)):
                await asyncio.sleep(REST_S)
                await run_round(arms[count, way], servers[way], count, kind, SECONDS[kind])
    return arms


def print_table(arms: dict[tuple[int, str], Arm], kind: str) -> None:
    """Both servers at each count; the ratio is of tokens a second, round by round."""
    print(f"{kind}: {ROUNDS} rounds of {SECONDS[kind]} s, {MAX_TOKENS[kind]} tokens an answer\n")
    print(
        "| streams | server | tokens/s | / vllm | CPU us a token | first token p50 / p99 ms "
        "| refused |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (count, way), arm in arms.items():
        ratio = "-"
        if way != "vllm":
            bare = arms[count, "vllm"].tokens_per_s
            ratio = spread([a / b for a, b in zip(arm.tokens_per_s, bare, strict=True)])
        first = [1000 * percentile(arm.first_s, share) for share in (0.5, 0.99)]
        print(
            f"| {count} | {way} | {spread(arm.tokens_per_s, digits=0)} | {ratio} "
            f"| {spread(arm.cpu_us, digits=0)} | {first[0]:.1f} / {first[1]:.1f} "
            f"| {arm.error_count} of {arm.asked_count} |"
        )


def print_parts(arms: dict[tuple[int, str], Arm]) -> None:
    """Where the CPU of a token goes, dearest first."""
    for (count, way), arm in arms.items():
        middle = {part: statistics.median(spent) for part, spent in arm.parts_us.items()}
        shown = sorted(middle.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{part} {cpu_us:.0f}" for part, cpu_us in shown if cpu_us >= 1)
        print(f"CPU us a token, {way}, {count} streams: {parts}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SECONDS), default="tiny")
    parser.add_argument("--arms", default=",".join(ARMS), help="vllm is the baseline")
    arguments = parser.parse_args()
    kind: str = arguments.model
    ways = [way for way in ARMS if way in arguments.arms.split(",")]
    if "ray" in ways and find_spec("pyarrow") is None:
        print("Ray Serve LLM is left out: it wants pyarrow (`pip install pyarrow`)")
        ways.remove("ray")
    with tempfile.TemporaryDirectory(prefix="ip-load-") as base:
        if kind == "tiny":
            model = make_tiny_model(Path(base) / "tiny", context_max=CONTEXT)
        else:
            kept = Path(__file__).parents[1] / ".models"
            kept.mkdir(exist_ok=True)
            (Path(base) / "models").symlink_to(kept, target_is_directory=True)
            model = prepare_default_model(Path(base))
        settings = {"INFERPIPE_MODEL_NAME": NAME, "INFERPIPE_CONTEXT_MAX": str(CONTEXT)}
        with ExitStack() as stack:
            waits, servers = [], {}
            for way in ways:
                if way == "inferpipe":
                    service = start_service(Path(base) / "data", model, **settings)
                    stack.callback(stop_service, service)
                    waits.append(service.wait_healthy)
                    servers[way] = Server(service.port, service.process.pid)
                    continue
                port = free_port()
                command = peer_command(way, model, port, Path(base))
                servers[way], wait = stack.enter_context(
                    peer(command, port, Path(base) / f"{way}.log")
                )
                waits.append(wait)
            for wait in waits:
                wait()
            print(machine())
            arms = uvloop.run(measure(servers, kind))
            print_table(arms, kind)
            print_parts(arms)


if __name__ == "__main__":
    main()

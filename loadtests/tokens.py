"""Tokens through the whole service beside the engine alone: tokens a second and the first one.

Run it as `python -m loadtests.tokens` from the root of the repository; it takes about 110 s. Two
arms take turns on the same engine process: `service` is `POST /v1/execute/stream` of
`chat-assistant` (proxy, ingress, journal, executor, link, engine), `engine` is the bare token link
to the model replica with a grant of our own. The model is tiny, so that the cost of serving shows;
with a real one the engine's own time covers it.
"""

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import orjson
import uvloop

from loadtests.http_client import closed_loop, percentile
from loadtests.service import Target, execute_body, machine, spread, tiny_service
from serve_app.adapters.redis_calls import RedisCalls
from serve_app.adapters.redis_nodes import RedisNodes, RedisOptions
from serve_app.adapters.redis_replicas import RedisReplicas
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_link import TcpTokenLink
from serve_app.core.grants import sign_grant
from serve_app.core.inference import GenerationRequest, Message

STREAM_COUNTS = (1, 16, 64)
ROUNDS = 3
SECONDS = 3.0
MAX_TOKENS = 128
GRANT_MS = 60_000

# One answer: its token count; the callback is for its first token.
Answer = Callable[[int, str, Callable[[], None]], Awaitable[int]]


@dataclass(slots=True)
class Arm:
    """All rounds of one way to the tokens at one stream count."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    error_count: int = 0


async def run_round(arm: Arm, streams: int, answer: Answer) -> None:
    """Streams without pause, each question a new one, so that no prompt is cached whole."""
    tokens = 0
    asked = 0
    begin = time.perf_counter()

    async def call(caller: int) -> bool:
        nonlocal tokens, asked
        asked += 1
        started = time.perf_counter()
        question = f"{asked} {caller} {started}: tell me more"
        count = await answer(
            caller, question, lambda: arm.first_s.append(time.perf_counter() - started)
        )
        tokens += count
        return count > 0

    timings = await closed_loop(streams, SECONDS, call)
    arm.tokens_per_s.append(tokens / (time.perf_counter() - begin))
    arm.error_count += timings.error_count


async def through_service(target: Target, arm: Arm, streams: int) -> None:
    """The whole way."""
    connections = [target.connection() for _ in range(streams)]

    async def answer(caller: int, question: str, first: Callable[[], None]) -> int:
        is_first = True

        def received(part: bytes) -> None:
            nonlocal is_first
            if is_first and b"event: chunk" in part:
                is_first = False
                first()

        turns = [{"role": "user", "content": question}]
        value = {"messages": turns, "temperature": 0, "maxTokens": MAX_TOKENS}
        body = execute_body("chat-assistant", value)
        status, raw = await connections[caller].stream("/v1/execute/stream", body, received)
        return completion_tokens(raw) if status == 200 else 0

    try:
        await run_round(arm, streams, answer)
    finally:
        for connection in connections:
            connection.close()


def completion_tokens(raw: bytes) -> int:
    """The count in the stream's terminal event; 0 when it did not complete."""
    events = without_chunk_borders(raw).split(b"\n\n")
    done = next((event for event in events if b"event: execution.completed" in event), None)
    if done is None:
        return 0
    result = orjson.loads(done[done.index(b"data: ") + 6 :])
    return int(result["usage"]["completionTokens"])


def without_chunk_borders(raw: bytes) -> bytes:
    """The body of a chunked answer."""
    parts, at = [], 0
    while (end := raw.find(b"\r\n", at)) > at:
        size = int(raw[at:end], 16)
        parts.append(raw[end + 2 : end + 2 + size])
        at = end + size + 4
    return b"".join(parts)


class Engine:
    """The replica's own link, as an executor uses it, with grants signed here."""

    def __init__(self, target: Target) -> None:
        assert target.data_dir is not None, "a service of our own has a known directory"
        self._secret = (target.data_dir / "cluster.secret").read_bytes().strip()
        self._redis_url = orjson.loads((target.data_dir / "valkey" / "endpoint.json").read_bytes())
        self._clock, self._entropy = SystemClock(), SystemEntropy()

    async def run(self, arm: Arm, streams: int) -> None:
        """One round."""
        endpoint = await self._endpoint()
        link = TcpTokenLink(self._secret, self._clock, self._entropy)

        async def answer(_: int, question: str, first: Callable[[], None]) -> int:
            request = GenerationRequest(
                request_id=self._entropy.token(),
                messages=(Message("user", question),),
                max_tokens=MAX_TOKENS,
                temperature=0,
            )
            expires_at_ms = self._clock.now_ms() + GRANT_MS
            grant = sign_grant(self._secret, request.request_id, endpoint, expires_at_ms)
            count = 0
            async with aclosing(link.generate(grant, request)) as chunks:
                async for chunk in chunks:
                    if count == 0 and chunk.token_ids:
                        first()
                    count += len(chunk.token_ids)
            return count

        try:
            await run_round(arm, streams, answer)
        finally:
            await link.close()

    async def _endpoint(self) -> tuple[str, str, int]:
        nodes = RedisNodes(RedisOptions((self._redis_url["url"],)))
        calls = RedisCalls(nodes, self._clock)
        reports = await RedisReplicas(nodes, calls, self._clock).latest()
        await calls.close()
        load = next(report.load for report in reports if report.phase == "ready")
        return load.replica_id, load.host, load.port


async def measure(target: Target) -> dict[tuple[int, str], Arm]:
    """All arms, taking turns."""
    arms = {(count, way): Arm() for count in STREAM_COUNTS for way in ("engine", "service")}
    engine = Engine(target)
    await engine.run(Arm(), STREAM_COUNTS[1])  # warm: code paths, and the engine's batch sizes
    await through_service(target, Arm(), STREAM_COUNTS[1])
    for number in range(ROUNDS):
        for count in STREAM_COUNTS:
            for way in sorted(("engine", "service"), reverse=bool(number % 2)):
                if way == "engine":
                    await engine.run(arms[count, way], count)
                else:
                    await through_service(target, arms[count, way], count)
    return arms


def print_table(arms: dict[tuple[int, str], Arm]) -> None:
    """Both ways at each count; the ratio is of tokens a second, round by round."""
    print(f"{ROUNDS} rounds of {SECONDS} s, at most {MAX_TOKENS} tokens an answer\n")
    print("| streams | way | tokens/s | service / engine | first chunk p50 / p99 ms | errors |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (count, way), arm in arms.items():
        ratio = "-"
        if way == "service":
            bare = arms[count, "engine"].tokens_per_s
            ratio = spread([a / b for a, b in zip(arm.tokens_per_s, bare, strict=True)])
        first = [1000 * percentile(arm.first_s, share) for share in (0.5, 0.99)]
        print(
            f"| {count} | {way} | {spread(arm.tokens_per_s, digits=0)} | {ratio} "
            f"| {first[0]:.1f} / {first[1]:.1f} | {arm.error_count} |"
        )


def main() -> None:
    """Measure and print."""
    with tiny_service() as target:
        print(machine())
        print_table(uvloop.run(measure(target)))


if __name__ == "__main__":
    main()

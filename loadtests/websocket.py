"""Tokens over `/v1/ws` beside the bare token link and the OpenAI stream.

Run it as `python -m loadtests.websocket` from the root of the repository; it takes about 170 s. All
ways take turns on one engine process: `engine` is the bare link to the model replica, `openai` is
`POST /v1/chat/completions` as a stream, the others are the socket protocol: a socket for each
stream, the same with permessage-deflate, and one socket for all. Clients are in this process and
cost CPU too: each looks only for the end of an answer and for its token count.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import count

import orjson
import uvloop
from websockets.asyncio.client import ClientConnection, connect

from loadtests.http_client import percentile
from loadtests.service import Target, machine, spread, tiny_service
from loadtests.tokens import MAX_TOKENS, Answer, Arm, Engine, run_round

STREAM_COUNTS = (1, 32)
ROUNDS = 3
WAYS = ("engine", "openai", "ws", "ws deflate", "ws shared")
_COMPLETION = re.compile(rb'"completion_tokens": ?(\d+)')


class Socket:
    """One socket; answers on it are told apart by their ids."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = count()
        self._waiting: dict[bytes, Callable[[bytes], None]] = {}

    async def read(self) -> None:
        """Hand out messages until the socket is closed."""
        async for data in self._connection:
            message = data if isinstance(data, bytes) else data.encode()
            at = message.rfind(b'"request_id":"') + 14
            self._waiting[message[at : message.index(b'"', at)]](message)

    async def ask(self, question: str, first: Callable[[], None]) -> int:
        """One answer; its token count, 0 for an error."""
        request_id = f"r{next(self._ids)}"
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        has_begun = False

        def heard(message: bytes) -> None:
            nonlocal has_begun
            if message.startswith(b'{"type":"stream_chunk"'):
                if not has_begun:
                    has_begun = True
                    first()
            elif not ended.done():
                found = _COMPLETION.search(message)
                is_end = message.startswith(b'{"type":"stream_end"')
                ended.set_result(int(found.group(1)) if found and is_end else 0)

        self._waiting[request_id.encode()] = heard
        request = {"prompt": question, "temperature": 0, "max_tokens": MAX_TOKENS}
        message = {"type": "inference", "request_id": request_id, "request": request}
        await self._connection.send(orjson.dumps(message), text=True)
        try:
            return await ended
        finally:
            del self._waiting[request_id.encode()]


async def over_sockets(target: Target, arm: Arm, streams: int, way: str) -> None:
    """A round over one socket, or over one for each stream."""
    url = target.url.replace("http://", "ws://") + "/v1/ws"
    headers = {"Authorization": f"Bearer {target.api_key}"}
    async with AsyncExitStack() as stack:
        sockets, readers = [], []
        for _ in range(1 if way == "ws shared" else streams):
            compression = "deflate" if way == "ws deflate" else None
            connecting = connect(url, additional_headers=headers, compression=compression)
            socket = Socket(await stack.enter_async_context(connecting))
            sockets.append(socket)
            readers.append(asyncio.ensure_future(socket.read()))

        async def answer(caller: int, question: str, first: Callable[[], None]) -> int:
            return await sockets[caller % len(sockets)].ask(question, first)

        await run_round(arm, streams, answer)
    await asyncio.wait(readers)


async def over_openai(target: Target, arm: Arm, streams: int) -> None:
    """A round of `POST /v1/chat/completions`."""
    connections = [target.connection() for _ in range(streams)]

    async def answer(caller: int, question: str, first: Callable[[], None]) -> int:
        is_first = True

        def received(part: bytes) -> None:
            nonlocal is_first
            if is_first and b'"content":' in part:
                is_first = False
                first()

        body = {
            "model": "tiny", "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": question}],
        }  # fmt: skip
        status, raw = await connections[caller].stream(
            "/v1/chat/completions", orjson.dumps(body), received
        )
        found = _COMPLETION.findall(raw)
        return int(found[-1]) if status == 200 and found else 0

    checked: Answer = answer
    try:
        await run_round(arm, streams, checked)
    finally:
        for connection in connections:
            connection.close()


async def measure(target: Target) -> dict[tuple[int, str], Arm]:
    """All ways, taking turns; the first round of each is not counted."""
    arms = {(streams, way): Arm() for streams in STREAM_COUNTS for way in WAYS}
    engine = Engine(target)

    async def one(arm: Arm, streams: int, way: str) -> None:
        if way == "engine":
            await engine.run(arm, streams)
        elif way == "openai":
            await over_openai(target, arm, streams)
        else:
            await over_sockets(target, arm, streams, way)

    for way in WAYS:
        await one(Arm(), STREAM_COUNTS[-1], way)
    for number in range(ROUNDS):
        for streams in STREAM_COUNTS:
            for way in WAYS if number % 2 else reversed(WAYS):
                await one(arms[streams, way], streams, way)
    return arms


def print_table(arms: dict[tuple[int, str], Arm]) -> None:
    """Every way at each count; ratios are of tokens a second to the bare link's, by round."""
    print(f"{ROUNDS} rounds, at most {MAX_TOKENS} tokens an answer\n")
    print("| streams | way | tokens/s | way / engine | first token p50 / p99 ms | errors |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (streams, way), arm in arms.items():
        bare = arms[streams, "engine"].tokens_per_s
        ratio = spread([a / b for a, b in zip(arm.tokens_per_s, bare, strict=True)])
        first = [1000 * percentile(arm.first_s, share) for share in (0.5, 0.99)]
        print(
            f"| {streams} | {way} | {spread(arm.tokens_per_s, digits=0)} "
            f"| {'-' if way == 'engine' else ratio} | {first[0]:.1f} / {first[1]:.1f} "
            f"| {arm.error_count} |"
        )


def main() -> None:
    """Measure and print."""
    with tiny_service() as target:
        print(machine())
        print_table(uvloop.run(measure(target)))


if __name__ == "__main__":
    main()

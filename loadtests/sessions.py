"""What a session is worth: prompt tokens found in the KV cache, turn by turn, on two replicas.

Run it as `python -m loadtests.sessions` from the root of the repository; it takes about 2 min. The
engines are real and their model is tiny. CONVERSATIONS run at once, TURNS turns each, once as
sessions over the socket and once without: each turn then goes, with the same history, to the host
that its number names, as a client that spreads its requests by itself would send it (its session
keeps the history; the address overrules its home). The answers
of both are the same length, so the prompts are too.
"""

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack

import httpx
import orjson
import uvloop
from websockets.asyncio.client import ClientConnection, connect

from loadtests.service import Target, machine, tiny_service

CONVERSATIONS = 6
TURNS = 10
ANSWER_TOKENS = 12
REPLICAS = 2

# Prompt and cached tokens of each conversation's turn, by the turn's number.
Table = dict[int, list[tuple[int, int]]]


async def ask(connection: ClientConnection, **request: object) -> tuple[str, dict[str, int]]:
    """One answer and its usage."""
    members = {"temperature": 0, "max_tokens": ANSWER_TOKENS, **request}
    await connection.send(orjson.dumps({"type": "inference", "request": members}), text=True)
    text = ""
    while True:
        message = orjson.loads(await connection.recv())
        if message["type"] == "stream_end":
            return text, message["usage"]
        if message["type"] == "error":
            raise RuntimeError(message["error"])
        text += message["content"]


async def as_sessions(target: Target, api: httpx.AsyncClient, table: Table) -> None:
    """Each conversation is a session; the router chooses."""

    async def conversation(number: int, socket: ClientConnection) -> None:
        made = await api.post("/v1/sessions", json={"model": "tiny"})
        session = made.raise_for_status().json()["id"]
        for turn in range(TURNS):
            _, usage = await ask(socket, prompt=question(number, turn), session_id=session)
            table[turn].append((usage["prompt_tokens"], usage["cached_tokens"]))

    url = target.url.replace("http://", "ws://") + "/v1/ws"
    await over_sockets(target, [url] * CONVERSATIONS, conversation)


async def spread(target: Target, api: httpx.AsyncClient, table: Table) -> None:
    """Each turn goes to the next host, with a session that holds the same turns there."""
    hosts = (await api.get("/v1/hosts")).raise_for_status().json()["hosts"]
    urls = [f"{host['apiUrl']}/v1/ws" for host in hosts if host["status"] == "ready"]
    if len(urls) != REPLICAS:
        raise RuntimeError(f"{len(urls)} hosts are ready, not {REPLICAS}")

    async def conversation(number: int, *sockets: ClientConnection) -> None:
        made = await api.post("/v1/sessions", json={"model": "tiny"})
        session = made.raise_for_status().json()["id"]
        for turn in range(TURNS):
            socket = sockets[(number + turn) % len(sockets)]
            prompt = question(number + CONVERSATIONS, turn)
            _, usage = await ask(socket, prompt=prompt, session_id=session)
            table[turn].append((usage["prompt_tokens"], usage["cached_tokens"]))

    async with AsyncExitStack() as stack:
        pairs = [
            [await stack.enter_async_context(opened(target, url)) for url in urls]
            for _ in range(CONVERSATIONS)
        ]
        await asyncio.gather(*(conversation(n, *pair) for n, pair in enumerate(pairs)))


def question(conversation: int, turn: int) -> str:
    """Nobody else's, so that only a conversation's own turns can be cached."""
    return f"{conversation * 7919:08d} {turn}?"


def opened(target: Target, url: str) -> connect:
    """A socket to be entered."""
    headers = {"Authorization": f"Bearer {target.api_key}"}
    return connect(url, additional_headers=headers, compression=None)


async def over_sockets(target: Target, urls: list[str], conversation: object) -> None:
    """One socket for each conversation."""
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(opened(target, url)) for url in urls]
        await asyncio.gather(*(conversation(n, s) for n, s in enumerate(sockets)))  # type: ignore[operator]


async def measure(target: Target) -> dict[str, Table]:
    """Both ways, one after the other, with conversations of their own."""
    tables: dict[str, Table] = {"session": defaultdict(list), "spread": defaultdict(list)}
    headers = {"Authorization": f"Bearer {target.api_key}"}
    async with httpx.AsyncClient(base_url=target.url, headers=headers, timeout=60) as api:
        await as_sessions(target, api, tables["session"])
        await spread(target, api, tables["spread"])
    return tables


def print_table(tables: dict[str, Table]) -> None:
    """Mean prompt and cached tokens of each turn, and of all."""
    print(f"{CONVERSATIONS} conversations at once, {TURNS} turns, {REPLICAS} replicas\n")
    print("| turn | prompt tokens | cached, session | cached, spread |")
    print("| --- | --- | --- | --- |")
    for turn in range(TURNS):
        prompt, kept = means(tables["session"][turn])
        _, lost = means(tables["spread"][turn])
        print(f"| {turn + 1} | {prompt:.0f} | {kept:.0f} | {lost:.0f} |")
    for way, table in tables.items():
        prompt, cached = means([pair for pairs in table.values() for pair in pairs])
        print(f"{way}: {100 * cached / prompt:.0f} % of all prompt tokens came from the cache")


def means(pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Of both members."""
    return sum(p for p, _ in pairs) / len(pairs), sum(c for _, c in pairs) / len(pairs)


def main() -> None:
    """Measure and print."""
    with tiny_service(INFERPIPE_MODEL_REPLICAS=str(REPLICAS)) as target:
        print(machine())
        print_table(uvloop.run(measure(target)))


if __name__ == "__main__":
    main()

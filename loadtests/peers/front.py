"""The front process of a peer that has no HTTP of its own: start, wait for, cancel, over aiohttp.

Runs in the peers' own environment. A peer's file gives the three functions.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import uvloop
from aiohttp import web

from loadtests.peers.work import Work


@dataclass(frozen=True, slots=True)
class Front:
    """What a peer can be asked; `open` is awaited once, in the loop, before the first request."""

    open: Callable[[], Awaitable[None]]
    run: Callable[[Work], Awaitable[None]]
    start: Callable[[Work], Awaitable[None]]
    cancel: Callable[[str], Awaitable[None]]


def serve(front: Front, port: int) -> None:
    """Serve on loopback until killed."""
    uvloop.run(_serve(front, port))


async def _serve(front: Front, port: int) -> None:
    await front.open()

    async def run(request: web.Request) -> web.Response:
        await front.run(Work(**json.loads(await request.read())))
        return web.Response(body=b"done")

    async def start(request: web.Request) -> web.Response:
        await front.start(Work(**json.loads(await request.read())))
        return web.Response(status=202)

    async def cancel(request: web.Request) -> web.Response:
        await front.cancel(json.loads(await request.read())["id"])
        return web.Response(status=202)

    app = web.Application()
    app.router.add_post("/run", run)
    app.router.add_post("/start", start)
    app.router.add_post("/cancel", cancel)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=512).start()
    await asyncio.Event().wait()

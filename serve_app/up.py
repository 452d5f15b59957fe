"""The local service: start everything on this machine, show it, and stop all of it again.

Owns the order of start and stop, and what is asked of the machine before anything runs. Invariant:
what this process started, and nothing else, is gone when it ends, whichever way it is told to end.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic import SecretStr

from serve_app.adapters.local_cluster import ClusterFailedError, LocalCluster
from serve_app.adapters.model_weights import check_model_dir, prepare_default_model
from serve_app.adapters.redis_connect import redis_options
from serve_app.adapters.redis_replicas import ReplicaPhase, read_phases
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.valkey_server import EmbeddedValkey
from serve_app.core.auth import new_key
from serve_app.main import build_app
from serve_app.settings import Settings

START_WITHIN_S = 300.0  # weights, engine and Ray on a slow machine
LOOK_S = 0.25


async def serve_locally(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop all that was started.

    Raises:
        ServeAppError, ClusterFailedError, ModelFilesError, OSError: it cannot start; the message
            says what to do.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    started_s = SystemClock().monotonic_s()
    _check_port(settings)
    settings, is_new_key = _with_secrets(_with_model(settings))
    _turn_logs(settings)
    async with _store(settings) as settings:
        cluster = LocalCluster(settings)
        try:
            _say("starting Ray and the engine ...")
            starting = asyncio.get_running_loop().create_task(
                asyncio.to_thread(cluster.start, build_app)
            )
            if not await _until_ready(settings, cluster, starting, stopped):
                return
            _greet(settings, is_new_key, SystemClock().monotonic_s() - started_s)
            await stopped.wait()
            _say("stopping ...")
        finally:
            await asyncio.to_thread(cluster.stop)
    _say("stopped")


async def _until_ready(
    settings: Settings,
    cluster: LocalCluster,
    starting: "asyncio.Task[None]",
    stopped: asyncio.Event,
) -> bool:
    """Show the phases until all is ready; False when told to stop before.

    Raises:
        ClusterFailedError: a part failed, with its last words.
    """
    clock = SystemClock()
    give_up_s = clock.monotonic_s() + START_WITHIN_S
    shown = ""
    while not stopped.is_set():
        if starting.done():
            starting.result()
        phases = await asyncio.to_thread(
            read_phases, redis_options(settings), cluster.started_at_ms
        )
        _raise_if_failed(phases)
        status = cluster.status() if starting.done() else "ray: starting"
        line = ", ".join([status, *(f"engine: {phase.detail or phase.phase}" for phase in phases)])
        if line != shown:
            shown = line
            _say(line)
        served = {phase.models for phase in phases if phase.phase == "ready"}
        if cluster.is_ready and served >= {one.model_names for one in settings.of_each_model()}:
            return True
        if clock.monotonic_s() > give_up_s:
            raise ClusterFailedError(f"not ready within {START_WITHIN_S:.0f} s: {line}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), LOOK_S)
    with contextlib.suppress(Exception):  # it is being stopped; how its start ended is no matter
        await starting
    return False


def _raise_if_failed(phases: tuple[ReplicaPhase, ...]) -> None:
    for phase in phases:
        if phase.phase == "failed":
            raise ClusterFailedError(f"the engine died at start:\n{phase.detail}")


@contextlib.asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[Settings]:
    """The settings with the address of a store that runs: the given one, or the embedded one."""
    if settings.redis_url.get_secret_value():
        yield settings
        return
    server = EmbeddedValkey(
        settings.data_dir, SystemClock(), SystemEntropy(), fsync=settings.redis_fsync
    )
    _say("starting the embedded store ...")
    await server.start()
    keeper = asyncio.get_running_loop().create_task(_keep_alive(server))
    try:
        yield settings.model_copy(update={"redis_url": SecretStr(server.url)})
    finally:
        keeper.cancel()
        await asyncio.wait((keeper,))
        await server.stop()


async def _keep_alive(server: EmbeddedValkey) -> None:
    """Start the store again when it dies: same port, same password, same data."""
    while True:
        status = await server.wait()
        _say(f"the store ended with status {status}; starting it again")
        await server.stop()
        await server.start()


def _check_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise OSError(
                f"{settings.host}:{settings.port} cannot be bound ({error.strerror}); "
                "stop what uses it, or set INFERPIPE_PORT"
            ) from error


def _with_model(settings: Settings) -> Settings:
    """The settings with the place of every model, and the name of the one that has none."""
    if settings.models:
        models = tuple(
            one.model_copy(update={"path": str(_model_place(settings, one.path))})
            for one in settings.models
        )
        return settings.model_copy(update={"models": models})
    if settings.model_replicas == 0:
        return settings
    model = _model_place(settings, settings.model)
    name = settings.model_name or model.name
    return settings.model_copy(update={"model": str(model), "model_name": name})


def _model_place(settings: Settings, path: str) -> Path:
    if not path:
        _say("preparing the bundled model (17 s the first time) ...")
        return prepare_default_model(settings.data_dir)
    model = Path(path)
    # A hub name has no such path; vLLM fetches it, and its own words tell when it cannot.
    if model.exists() or path.startswith((".", "/", "~")):
        check_model_dir(model)
    return model


def _with_secrets(settings: Settings) -> tuple[Settings, bool]:
    """The settings with every secret set, and whether the API key was made just now."""
    secret = settings.cluster_secret.get_secret_value() or _kept_secret(settings.data_dir)
    key = settings.api_key.get_secret_value()
    made = new_key(SystemEntropy().token())
    is_dev = settings.dev if "dev" in settings.model_fields_set else settings.is_loopback
    update = {
        "cluster_secret": SecretStr(secret),
        "api_key": SecretStr(key or made),
        "dev": is_dev,
        "log_dir": settings.log_dir or settings.data_dir / "logs",
    }
    return settings.model_copy(update=update), not key


def _turn_logs(settings: Settings) -> None:
    """Begin new logs; the last run's stay beside them as `.1`."""
    assert settings.log_dir is not None, "set together with the secrets"
    settings.log_dir.mkdir(parents=True, exist_ok=True)
    for path in settings.log_dir.glob("*.log"):
        path.replace(path.with_suffix(".log.1"))


def _kept_secret(data_dir: Path) -> str:
    path = data_dir / "cluster.secret"
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="utf-8").strip()
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        secret = SystemEntropy().token()
        file.write(secret)
    return secret


def _greet(settings: Settings, is_new_key: bool, took_s: float) -> None:  # noqa: FBT001 - one caller
    url = f"http://{settings.host}:{settings.port}"
    key = settings.api_key.get_secret_value()
    header = "" if settings.dev else f" -H 'Authorization: Bearer {key}'"
    body = (
        '{"workflowId": "chat-assistant", "input": {"messages": [{"role": "user", '
        '"content": "What is the capital of France?"}], "temperature": 0}}'
    )
    lines = [
        f"ready after {took_s:.0f} s",
        f"  API   {url}   docs {url}/docs",
        *([f"  key   {key}   (admin, workspace {settings.workspace_id}; shown once)"] * is_new_key),
        "  try",
        f"  curl -N {url}/v1/execute/stream{header} -d '{body}'",
        "Ctrl-C stops everything.",
    ]
    _say("\n".join(lines))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

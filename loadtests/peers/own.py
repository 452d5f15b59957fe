"""Our own arms: `inferpipe up`, with pure steps and with steps that are recorded each."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import redis

from loadtests.peers.arm import Arm, Request
from loadtests.peers.parts import Parts, free_port
from loadtests.peers.work import FOLDER_VARIABLE, Work
from loadtests.service import Target, execute_body, tiny_service
from serve_app.adapters.redis_index import partition_key
from serve_app.settings import Settings

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

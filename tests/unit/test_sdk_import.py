"""What importing the package costs, measured in fresh interpreters."""

import json
import subprocess
import sys

import pytest

import inferpipe

SCRIPT = """
import json, sys, time
before = set(sys.modules)
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
roots = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
json.dump([seconds, roots], sys.stdout)
"""
SERVER_PACKAGES = {"ray", "vllm", "serve_app", "deployments", "fastapi", "redis", "torch"}


def cost_of(statement: str) -> tuple[float, set[str]]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(statement=statement)],
        capture_output=True, check=True, text=True, timeout=30,
    )  # fmt: skip
    seconds, roots = json.loads(run.stdout)
    return seconds, set(roots)


@pytest.mark.parametrize(
    ("statement", "absent", "limit_s"),
    [
        ("import inferpipe", {"httpx", "pydantic"}, 0.5),
        ("import inferpipe.wire", {"httpx", "asyncio"}, 2.0),
        ("from inferpipe import InferPipe", set(), 4.0),
        ("import inferpipe.cli", set(), 4.0),
    ],
)
def test_import_is_light(statement: str, absent: set[str], limit_s: float) -> None:
    # The limits leave room for a busy machine: alone, these take 0.01, 0.2 and 0.4 s.
    seconds, roots = cost_of(statement)
    assert not roots & (SERVER_PACKAGES | absent)
    assert seconds < limit_s


@pytest.mark.parametrize("name", inferpipe.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(inferpipe, name).__name__ == name
    assert name in dir(inferpipe)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Inferpipe'"):
        _ = inferpipe.Inferpipe

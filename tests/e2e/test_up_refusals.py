"""`inferpipe up` refuses what cannot work, in words, before it starts anything."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def up(data_dir: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INFERPIPE_")}
    return subprocess.run(
        [sys.executable, "-m", "inferpipe.cli", "up", *words],
        env={**environment, "INFERPIPE_DATA_DIR": str(data_dir), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = up(tmp_path, "--port", port)
    assert done.returncode == 1
    assert port in done.stderr
    assert "INFERPIPE_PORT" in done.stderr


def test_a_model_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    done = up(tmp_path, "--model", str(tmp_path / "model"))
    assert done.returncode == 1
    assert "config.json" in done.stderr
    missing = up(tmp_path, "--model", str(tmp_path / "missing"))
    assert missing.returncode == 1
    assert str(tmp_path / "missing") in missing.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INFERPIPE_PORT", "no-port"),
        ("INFERPIPE_API_KEY", "short"),
        ("INFERPIPE_REDIS_FSYNC", "never"),
        ("INFERPIPE_WORKSPACE_ID", "No Spaces"),
    ],
)
def test_a_setting_out_of_bounds(tmp_path: Path, name: str, value: str) -> None:
    done = up(tmp_path, **{name: value})
    assert done.returncode == 2
    assert name.removeprefix("INFERPIPE_").lower() in done.stderr.lower()
    assert "short" not in done.stderr or name != "INFERPIPE_API_KEY"  # a key is never shown


def test_an_unknown_key_in_the_config_file(tmp_path: Path) -> None:
    config = tmp_path / "inferpipe.yaml"
    config.write_text("prot: 8000\n")
    done = up(tmp_path, INFERPIPE_CONFIG=str(config))
    assert done.returncode == 2
    assert "prot" in done.stderr.lower()

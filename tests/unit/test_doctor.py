"""`inferpipe doctor`: what each trouble looks like, and that it ends with 1 where there is one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from inferpipe import __version__, cli, doctor
from inferpipe.testing import FakeServer
from serve_app import doctor as server_doctor
from serve_app.adapters.model_weights import ModelFilesError
from serve_app.doctor import ServerFinding
from serve_app.settings import Settings

Output = pytest.CaptureFixture[str]
HEALTHY: dict[str, Any] = {
    "status": "healthy",
    "version": __version__,
    "services": {"redis": {"status": "up"}, "models": {"status": "up", "replicas": 1}},
}


class Entry:
    """Stands for an importlib.metadata.EntryPoint."""

    def __init__(self, *found: ServerFinding, error: str | None = None) -> None:
        self.found = found
        self.error = error

    def load(self) -> Any:
        if self.error is not None:
            raise ImportError(self.error)
        return lambda is_quick: [*self.found, ServerFinding("quick", "ok", str(is_quick))]


def examine(
    monkeypatch: pytest.MonkeyPatch, health: dict[str, Any], *words: str, entry: Entry | None = None
) -> int:
    fake = FakeServer()
    fake.script("GET /v1/health", health, status=200 if health["status"] == "healthy" else 503)
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [entry] if entry else [])
    return cli.main(["doctor", *words], lambda _: fake.client())


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert examine(monkeypatch, HEALTHY) == 0
    out = capsys.readouterr().out
    assert "PROBLEM" not in out
    for text in ("service: http://fake.test is healthy", "service: models: up: replicas 1", "key:",
                 "no server is installed here"):  # fmt: skip
        assert text in out


@pytest.mark.parametrize(
    ("health", "code", "name", "verdict"),
    [
        ({**HEALTHY, "status": "starting"}, 0, "service", "warning"),
        ({**HEALTHY, "status": "unhealthy"}, 1, "service", "problem"),
        ({**HEALTHY, "services": {"redis": {"status": "down"}}}, 1, "service: redis", "problem"),
        ({**HEALTHY, "services": {"models": "up"}}, 0, "service: models", "ok"),
        ({**HEALTHY, "version": "0.0.1"}, 0, "versions", "warning"),
    ],
)
def test_health_is_judged(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
    health: dict[str, Any],
    code: int,
    name: str,
    verdict: str,
) -> None:
    assert examine(monkeypatch, health, "--json") == code
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found[name]["verdict"] == verdict
    assert bool(found[name]["remedy"]) == (verdict != "ok")


def test_service_that_is_away_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def away(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])
    client = FakeServer().client(transport=httpx.MockTransport(away))
    assert cli.main(["doctor"], lambda _: client) == 1
    out = capsys.readouterr().out
    assert "PROBLEM service: http://fake.test" in out
    assert "inferpipe up" in out


def test_key_that_is_refused_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    fake = FakeServer()
    refusal = {"title": "T", "status": 401, "code": "UNAUTHORIZED", "detail": "unknown key"}
    fake.script("GET /v1/health", HEALTHY)
    fake.script("GET /v1/executions", refusal, status=401)
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])
    assert cli.main(["doctor"], lambda _: fake.client(api_key="wrong-key-0123456")) == 1
    out = capsys.readouterr().out
    assert "PROBLEM key: 401 UNAUTHORIZED" in out
    assert "wrong-key" not in out


def test_findings_of_the_server_are_shown_with_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    entry = Entry(ServerFinding("disk", "problem", "full", "make room"))
    assert examine(monkeypatch, HEALTHY, "--quick", entry=entry) == 1
    out = capsys.readouterr().out
    assert "PROBLEM disk: full\n        -> make room\n" in out
    assert "quick: True" in out


def test_server_that_cannot_be_imported_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    assert examine(monkeypatch, HEALTHY, entry=Entry(error="No module named 'ray'")) == 0
    assert "No module named 'ray'" in capsys.readouterr().out


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", port=1, model_replicas=0)


def test_python_outside_a_virtual_environment_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_doctor.check_python().verdict in {"ok", "warning"}
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    found = server_doctor.check_python()
    assert (found.verdict, "make install" in found.remedy) == ("warning", True)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_doctor.check_packages().verdict == "ok"
    monkeypatch.setattr(server_doctor, "PACKAGES", ("json", "no_such_package"))
    found = server_doctor.check_packages()
    assert (found.verdict, found.detail) == ("problem", "missing: no_such_package")


@pytest.mark.parametrize(
    ("free_gib", "verdict"), [(0.4, "problem"), (0.6, "warning"), (2.9, "warning"), (3.1, "ok")]
)
def test_room_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: float, verdict: str
) -> None:
    usage = SimpleNamespace(free=int(free_gib * (1 << 30)))
    monkeypatch.setattr(server_doctor.shutil, "disk_usage", lambda _: usage)
    found = server_doctor.check_data_dir(tmp_path / "not" / "yet")
    assert found.verdict == verdict
    assert f"{free_gib:.1f} GiB free" in found.detail


def test_directory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = server_doctor.check_data_dir(tmp_path)
    assert (found.verdict, "INFERPIPE_DATA_DIR" in found.remedy) == ("problem", True)


@pytest.mark.parametrize("is_ours", [True, False])
def test_port_that_is_taken(monkeypatch: pytest.MonkeyPatch, is_ours: bool) -> None:
    def taken(*_: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket.socket, "bind", taken)
    monkeypatch.setattr(server_doctor, "_answers_as_inferpipe", lambda *_: is_ours)
    found = server_doctor.check_port("127.0.0.1", 8000)
    assert found.verdict == ("ok" if is_ours else "problem")
    assert is_ours or "INFERPIPE_PORT" in found.remedy


def test_store_that_does_not_run_yet(settings: Settings) -> None:
    found = server_doctor.check_store(settings)
    assert (found.verdict, "inferpipe up" in found.detail) == ("ok", True)


@pytest.mark.parametrize(
    ("model", "verdict"), [("", "ok"), ("/nowhere/at/all", "problem"), ("org/name", "warning")]
)
def test_model(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, model: str, verdict: str
) -> None:
    monkeypatch.setattr(server_doctor, "bundled_weights", lambda: Path("weights.gguf"))
    wanted = settings.model_copy(update={"model": model})
    assert server_doctor.check_model(wanted).verdict == verdict


def test_bundled_model_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    def missing() -> Path:
        raise ModelFilesError("the default model's weights are not installed")

    monkeypatch.setattr(server_doctor, "bundled_weights", missing)
    assert server_doctor.check_model(settings).verdict == "problem"


@pytest.mark.parametrize(
    ("outcome", "verdict", "text"),
    [
        (SimpleNamespace(returncode=0, stdout="0.32.0\n", stderr=""), "ok", "vLLM 0.32.0"),
        (SimpleNamespace(returncode=1, stdout="", stderr="T\nImportError: x\n"), "problem",
         "ImportError: x"),
        (subprocess.TimeoutExpired("python", 1), "problem", "took more than"),
    ],
)  # fmt: skip
def test_engine(monkeypatch: pytest.MonkeyPatch, outcome: Any, verdict: str, text: str) -> None:
    def ran(*_: object, **__: object) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", ran)
    found = server_doctor.check_engine("cpu")
    assert found.verdict == verdict
    assert text in found.detail


def test_last_error_of_a_log_is_shown(tmp_path: Path) -> None:
    lines = [
        '"level": "ERROR", cut off by the tail',
        '{"level": "ERROR", "message": "first"}',
        '{"level": "ERROR", "message": "the model is gone"}',
        "not json",
        '{"level": "INFO", "message": "request"}',
    ]
    (tmp_path / "model.log").write_text("\n".join(lines))
    (tmp_path / "router.log").write_text('{"level": "INFO", "message": "fine"}\n')
    (found,) = server_doctor.check_logs(tmp_path)
    assert found.verdict == "warning"
    assert found.detail == "model.log: 2 errors lately, the last: the model is gone"


def test_wrong_setting_is_named_and_ends_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERPIPE_PORT", "no-port")
    *_, last = server_doctor.findings(True)
    assert (last.name, last.verdict) == ("settings", "problem")
    assert "INFERPIPE_PORT" in last.detail


def test_all_questions_are_asked(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, tmp_path: Path
) -> None:
    def port(host: str, port: int) -> ServerFinding:
        return ServerFinding("port", "ok", f"{host}:{port}")

    def model(_: Settings) -> ServerFinding:
        return ServerFinding("model", "ok", "there")

    def names() -> Iterator[str]:
        monkeypatch.setenv("INFERPIPE_DATA_DIR", str(tmp_path))
        monkeypatch.setattr(server_doctor, "check_port", port)
        monkeypatch.setattr(server_doctor, "check_model", model)
        return (one.name for one in server_doctor.findings(True))

    expected = ["python", "packages", "settings", "data directory", "port", "store", "model"]
    assert list(names()) == expected

"""What a log line holds, and what it never shows."""

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.telemetry import (
    REDACTED,
    JsonFormatter,
    TextFormatter,
    configure_logging,
    log_context,
)


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [kept for kept in root.handlers if kept.get_name() == "inferpipe"]:
        root.removeHandler(handler)
        handler.close()


def line_of(message: object = "hello", **extra: object) -> dict[str, object]:
    record = logging.makeLogRecord(
        {"name": "serve_app.test", "levelname": "INFO", "msg": message, "created": 1.5, **extra}
    )
    line = json.loads(JsonFormatter().format(record))
    assert isinstance(line, dict)
    return line


def test_line_has_time_level_logger_and_message() -> None:
    assert line_of() == {
        "ts": "1970-01-01T00:00:01.500Z",
        "level": "INFO",
        "logger": "serve_app.test",
        "message": "hello",
    }


def test_what_other_libraries_note_in_a_record_is_no_field() -> None:
    assert line_of(_ray_timestamp_ns=1) == line_of()


def test_context_and_extra_become_fields_and_inner_wins() -> None:
    with log_context(request_id="r1", step_id="a"), log_context(step_id="b", worker_id="w"):
        inner = line_of(worker_id="extra")
    assert (inner["request_id"], inner["step_id"], inner["worker_id"]) == ("r1", "b", "extra")
    assert "request_id" not in line_of()


async def test_context_stays_with_its_task() -> None:
    async def log_one(name: str) -> object:
        with log_context(execution_id=name):
            await asyncio.sleep(0)
            return line_of()["execution_id"]

    assert await asyncio.gather(log_one("x"), log_one("y")) == ["x", "y"]


@pytest.mark.parametrize(
    "name", ["authorization", "Authorization", "api_key", "token", "secret", "X-API-Key"]
)
def test_secret_is_redacted_at_any_depth(name: str) -> None:
    hidden = {name: "hunter2", "items": [{name: "hunter2"}, "seen"]}
    with log_context(**{name: "hunter2"}):
        line = line_of(headers=hidden)
        text = TextFormatter().format(logging.makeLogRecord({"msg": "m", "headers": hidden}))
    assert line[name] == REDACTED
    assert line["headers"] == {name: REDACTED, "items": [{name: REDACTED}, "seen"]}
    assert "hunter2" not in f"{line}{text}"


def test_fields_do_not_replace_the_lines_own_keys() -> None:
    assert line_of(level="FAKE")["level"] == "INFO"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2**70, 2**70), ("\ud800", "\ud800"), ({1: {2}}, {"1": "{2}"}), (object, str(object))],
)
def test_odd_values_do_not_lose_the_line(value: object, shown: object) -> None:
    assert line_of(odd=value)["odd"] == shown


def test_endless_value_is_cut() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert "..." in str(line_of(odd=endless)["odd"])


def test_exception_is_in_the_line_with_its_trace() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        line = line_of(exc_info=sys.exc_info())
    assert str(line["exception"]).endswith("ValueError: boom")


def test_configuring_twice_writes_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("DEBUG", json=False)
    configure_logging("INFO", json=True)
    log = logging.getLogger("serve_app.test")
    log.debug("off")
    log.info("on %d", 1, extra={"step_id": "s"})
    (line,) = [json.loads(text) for text in capfd.readouterr().err.splitlines()]
    assert (line["message"], line["step_id"]) == ("on 1", "s")


def test_text_line_shows_fields_and_trace(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", json=False)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("serve_app.test").exception("failed", extra={"step_id": "s"})
    first, *rest = capfd.readouterr().err.splitlines()
    assert first.endswith("ERROR   serve_app.test: failed step_id=s")
    assert rest[-1] == "ValueError: boom"


def test_file_is_made_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "ingress.log"
    for number in range(2):
        configure_logging("INFO", json=True, path=path)
        logging.getLogger("serve_app.test").info("line %d", number)
    assert [json.loads(line)["message"] for line in path.read_text().splitlines()] == [
        "line 0",
        "line 1",
    ]


def test_record_below_the_level_is_not_formatted() -> None:
    class Loud:
        def __str__(self) -> str:
            raise AssertionError("formatted although the level is off")

    configure_logging("WARNING", json=True)
    logging.getLogger("serve_app.test").info("%s", Loud())


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging("LOUD", json=True)


async def test_system_clock_and_entropy_keep_the_ports_promises() -> None:
    clock, entropy = SystemClock(), SystemEntropy()
    before = clock.monotonic_s()
    await clock.sleep(0.001)
    assert clock.monotonic_s() > before
    assert clock.now_ms() > 1_700_000_000_000
    assert all(0 <= entropy.uniform() < 1 for _ in range(100))
    tokens = {entropy.token() for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {22}

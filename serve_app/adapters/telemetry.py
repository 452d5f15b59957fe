"""Logs: one line per record, with the fields that say whose it is.

Owns the format of a line, the fields bound to the current task, and what is kept out of both.
Does not own what is logged, or metrics. Invariant: a line never fails and never shows the value of
a field whose name says that it is a secret.
"""

import json as stdlib_json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import orjson

SECRET_FIELDS = frozenset({"authorization", "api_key", "apikey", "token", "secret", "x-api-key"})
REDACTED = "[redacted]"
FIELD_DEPTH_MAX = 6  # levels of nested values that a line shows; deeper, and endless ones, are cut

_HANDLER_NAME = "inferpipe"
# They log the URL of each request at INFO, and a stream token stands in the query of some.
# uvicorn's tells of each WebSocket with its query, where a token may stand.
_TALKATIVE_LOGGERS = ("httpx", "httpcore", "uvicorn.error")
_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_context: ContextVar[Mapping[str, object]] = ContextVar("log_context", default=MappingProxyType({}))


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Add fields to every record that this task, and those it starts meanwhile, logs inside.

    Inner fields win over outer ones of the same name, and `extra=` of a call over both.
    """
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure_logging(level: str, *, json: bool, path: Path | None = None) -> None:
    """Send this process's logs to a file, or to standard error; call it again to change them.

    Args:
        level: a name that `logging` knows, such as "INFO".
        json: one JSON object per line; else text for a person.
        path: appended to; its folder is made. None: the process's first standard error, because
            Serve puts a logger of its own in the place of `sys.stderr`.

    Raises:
        ValueError: the level is unknown.
    """
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.__stderr__)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    root = logging.getLogger()
    root.setLevel(level)
    for present in [kept for kept in root.handlers if kept.get_name() == _HANDLER_NAME]:
        root.removeHandler(present)
        present.close()  # of a file; it leaves standard error open
    root.addHandler(handler)
    for name in _TALKATIVE_LOGGERS:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: `ts`, `level`, `logger`, `message`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end.

        A field that bears the name of one of the line's own keys does not replace it.
        """
        line = {
            **_fields(record),
            "ts": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace := _trace(self, record):
            line["exception"] = trace
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # integers over 64 bits and lone surrogates, which the slow one can write
            return stdlib_json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A record as a line for a person, the fields as `name=value` at its end."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end; a trace follows on lines of its own."""
        pairs = "".join(f" {name}={value}" for name, value in _fields(record).items())
        start = f"{_timestamp(record)} {record.levelname:<7} {record.name}"
        line = f"{start}: {record.getMessage()}{pairs}"
        trace = _trace(self, record)
        return f"{line}\n{trace}" if trace else line


def _fields(record: logging.LogRecord) -> dict[str, object]:
    # Names that begin with _ are other libraries' own: Ray notes a time in every record so.
    extra = {
        name: value
        for name, value in vars(record).items()
        if name not in _OWN_ATTRIBUTES and not name.startswith("_")
    }
    return {
        name: _shown(name, value, FIELD_DEPTH_MAX)
        for name, value in {**_context.get(), **extra}.items()
    }


def _shown(name: object, value: object, depth: int) -> object:
    """The value as a line may show it: mappings and lists are searched for secrets too."""
    if str(name).lower() in SECRET_FIELDS:
        return REDACTED
    if not isinstance(value, Mapping | list | tuple):
        return value
    if depth == 0:
        return "..."
    if isinstance(value, Mapping):
        return {str(key): _shown(key, inner, depth - 1) for key, inner in value.items()}
    return [_shown("", inner, depth - 1) for inner in value]


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)

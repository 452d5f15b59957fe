"""What the command writes: results to stdout, everything else to stderr.

Owns the forms of both. Invariant: stdout holds results and nothing else, so that it can be piped;
what moves (progress) is written only where a person watches.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime

from pydantic import BaseModel

CLEAR_LINE = "\r\x1b[K"


def write(text: str) -> None:
    """Write to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_value(value: object) -> None:
    """Print one value: a text as it is, anything else as a line of JSON."""
    text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    write(text + "\n")


def print_rows(
    items: Iterable[BaseModel], columns: Sequence[str], *, as_json: bool, limit: int | None = None
) -> None:
    """Print one line per item, as it comes: columns parted by tabs, or JSON."""
    for count, item in enumerate(items, start=1):
        if as_json:
            print_value(item)
        else:
            write("\t".join(cell(getattr(item, name, None)) for name in columns) + "\n")
        if count == limit:
            return


def cell(value: object) -> str:
    """One value in a row; an empty one is a dash, so that columns can be counted."""
    match value:
        case None | "" | []:
            return "-"
        case datetime():
            return value.isoformat(timespec="seconds").replace("+00:00", "Z")
        case list() | tuple():
            return ",".join(str(one) for one in value)
        case bool():
            return "yes" if value else "no"
        case _:
            return " ".join(str(value).split())


def plain(value: object) -> object:
    """The value as JSON has it."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def complain(message: str, code: int = 0) -> int:
    """Say one line on stderr; return the exit code that goes with it."""
    sys.stderr.write(f"inferpipe: {' '.join(message.split())}\n")
    return code


class Progress:
    """One line on stderr that tells what goes on; nothing where no person watches."""

    def __init__(self) -> None:
        self._is_watched = sys.stderr.isatty()
        self._is_shown = False

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._is_watched:
            sys.stderr.write(f"{CLEAR_LINE}{text[:78]}")
            sys.stderr.flush()
            self._is_shown = True

    def clear(self) -> None:
        """Take the line away; to be called before anything else is written."""
        if self._is_shown:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()
            self._is_shown = False

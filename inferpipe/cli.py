"""The `inferpipe` command: run workflows from a shell.

Owns the way from the words of a command line to an exit code. Server commands come from the
entry-point group `inferpipe.commands`, so that this module needs no server package. Invariant:
stdout holds results and nothing else; every error is one line on stderr.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from inferpipe import doctor
from inferpipe._arguments import build_parser
from inferpipe._completion import script_for
from inferpipe._exit_codes import FAILED, INTERRUPTED, OK, REFUSED, UNREACHABLE, USAGE
from inferpipe._terminal import complain, write
from inferpipe.client import InferPipe
from inferpipe.errors import (
    ApiStatusError,
    ExecutionFailedError,
    InferPipeConnectionError,
    InferPipeError,
    InferPipeTimeoutError,
    InvalidArgumentError,
)

COMMAND_GROUP = "inferpipe.commands"
SERVER_COMMANDS = ("up",)  # named even where the server is not installed, to say how to install it
INSTALL_HINT = "needs the server: pip install 'inferpipe[server]'"

HINTS = {
    401: "set INFERPIPE_API_KEY or pass --api-key-file",
    403: "use a key of this workspace with the scope for it, or change --workspace",
    404: "check the id, and that --base-url and --workspace are the right ones",
    429: "wait, or raise the key's rate limit",
    503: "the server is overloaded or starting: try again later",
}

Connect = Callable[[argparse.Namespace], InferPipe]


class ServerCommand(Protocol):
    """What an entry point of the group `inferpipe.commands` names."""

    help: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's own arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it; return the exit code."""
        ...


def connect_from(args: argparse.Namespace) -> InferPipe:
    """Return a client for the arguments, with the environment below them."""
    key = None if args.api_key_file is None else _key_from(args.api_key_file)
    given = {"base_url": args.base_url, "api_key": key, "workspace_id": args.workspace}
    return InferPipe.from_env(
        args.environment, **{name: value for name, value in given.items() if value is not None}
    )


def main(argv: Sequence[str] | None = None, connect: Connect = connect_from) -> int:
    """Run one command; return its exit code (argparse itself exits with 2)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    _add_server_commands(commands, words[0] if words else "")
    args, unknown = parser.parse_known_args(words)
    if unknown and not getattr(args, "takes_anything", False):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return _run(parser, args, connect)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our stdout has left. Without this the interpreter complains once more when
        # it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except InferPipeError as error:
        return _report(error)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace, connect: Connect) -> int:
    if hasattr(args, "run_server"):
        return int(args.run_server(args))
    if hasattr(args, "is_completion"):
        write(script_for(args.shell, parser))
        return OK
    with connect(args) as client:
        handler = doctor.examine if hasattr(args, "is_doctor") else args.handler
        code: int = handler(client, args)
        sys.stdout.flush()
        return code


def _key_from(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--api-key-file: {error}") from error
    if not key:
        raise InvalidArgumentError(f"--api-key-file: {path} is empty")
    return key


def _report(error: InferPipeError) -> int:
    match error:
        case ExecutionFailedError():
            return complain(str(error), FAILED)
        case InvalidArgumentError():
            return complain(str(error), USAGE)
        case InferPipeTimeoutError():
            return complain(f"{error}; what was accepted goes on: try again later", UNREACHABLE)
        case InferPipeConnectionError():
            hint = "start the server with `inferpipe up`, or set --base-url or INFERPIPE_BASE_URL"
            return complain(f"{error}; {hint}", UNREACHABLE)
        case ApiStatusError():
            hint = HINTS.get(error.status, "")
            return complain(f"{error}; {hint}" if hint else str(error), REFUSED)
        case _:
            return complain(str(error), REFUSED)


def _add_server_commands(commands: Any, first_word: str) -> None:
    """Add what is needed of the server's commands.

    Finding and importing them is slow (Ray takes a second), so a command of the client's own skips
    both: only the one that is asked for is imported, or all of them for `--help` and completions.
    """
    is_own = first_word in commands.choices and first_word != "completion"
    if is_own or first_word == "--version":
        return
    found = {entry.name: entry for entry in entry_points(group=COMMAND_GROUP)}
    loads_all = first_word.startswith("-") or first_word == "completion"
    for name in dict.fromkeys((*found, *SERVER_COMMANDS)):
        if name in commands.choices:
            continue
        if name != first_word and not loads_all:
            commands.add_parser(name)  # for the message that lists the choices
            continue
        command = _load(found.get(name))
        parser = commands.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(parser)
        parser.set_defaults(run_server=command.run)


def _load(entry: EntryPoint | None) -> ServerCommand:
    if entry is None:
        return _MissingCommand("")
    try:
        command: ServerCommand = entry.load()
    except ImportError as error:
        # The distribution names its server commands even where the extra is not installed.
        return _MissingCommand(f" ({error})")
    return command


class _MissingCommand:
    """Stands for a command whose packages are not installed."""

    help = INSTALL_HINT

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Accept anything: the arguments are not known here."""
        parser.set_defaults(takes_anything=True)

    def run(self, _: argparse.Namespace) -> int:
        """Say what to install."""
        return complain(f"this command {INSTALL_HINT}{self._reason}", USAGE)


if __name__ == "__main__":
    raise SystemExit(main())

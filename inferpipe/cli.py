"""The `inferpipe` command: run workflows from a shell.

Owns the arguments, what goes to stdout and stderr, and the exit codes. Server commands come from
the entry-point group `inferpipe.commands`, so that this module needs no server package.
Invariant: stdout holds results and nothing else; every error is one line on stderr.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from inferpipe import __version__
from inferpipe._stream import StreamEvent, completed, to_chunk
from inferpipe.client import InferPipe
from inferpipe.errors import (
    ApiStatusError,
    ExecutionFailedError,
    InferPipeConnectionError,
    InferPipeError,
    InferPipeTimeoutError,
    InvalidArgumentError,
)
from inferpipe.streams import ExecutionStream
from inferpipe.wire import ExecutionResult

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
REFUSED = 4
INTERRUPTED = 130

COMMAND_GROUP = "inferpipe.commands"
SERVER_COMMANDS = ("up",)  # named even where the server is not installed, to say how to install it
INSTALL_HINT = "needs the server: pip install 'inferpipe[server]'"

EPILOG = """\
exit codes:
  0    done
  1    the execution failed or was cancelled; for `health`: the server is not healthy
  2    wrong usage: arguments, or an input that is not a JSON object
  3    the server cannot be reached, or did not answer in time
  4    the server refused the call (4xx or 5xx)
  130  interrupted, or the reader of stdout has left

environment: INFERPIPE_API_KEY, INFERPIPE_WORKSPACE_ID, INFERPIPE_BASE_URL
"""

HINTS = {
    401: "set INFERPIPE_API_KEY or pass --api-key",
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
    given = {"base_url": args.base_url, "api_key": args.api_key, "workspace_id": args.workspace}
    return InferPipe.from_env(**{name: value for name, value in given.items() if value is not None})


def main(argv: Sequence[str] | None = None, connect: Connect = connect_from) -> int:
    """Run one command; return its exit code (argparse itself exits with 2)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    _add_server_commands(commands, words[0] if words else "")
    args, unknown = parser.parse_known_args(words)
    if unknown and not getattr(args, "takes_anything", False):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if hasattr(args, "run_server"):
            return int(args.run_server(args))
        with connect(args) as client:
            code: int = args.handler(client, args)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our stdout has left. Without this the interpreter complains once more when
        # it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except InferPipeError as error:
        return _report(error)


def build_parser() -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser with the client's commands, and the place where further ones go."""
    parser = argparse.ArgumentParser(
        prog="inferpipe",
        description="Run LLM workflows on an inferpipe server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"inferpipe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    server = argparse.ArgumentParser(add_help=False)
    group = server.add_argument_group("server")
    group.add_argument("--base-url", metavar="URL", help="default: http://127.0.0.1:8000")
    group.add_argument("--api-key", metavar="KEY", help="better in the environment: ps shows this")
    group.add_argument("--workspace", metavar="ID", help="refuse a key of another workspace")

    run = commands.add_parser("run", parents=[server], help="run a workflow, print its data")
    run.add_argument("workflow", metavar="WORKFLOW", help="the workflow's id")
    run.add_argument("--input", default="{}", metavar="JSON|@FILE|-", help="an object (default {})")
    mode = run.add_mutually_exclusive_group()
    mode.add_argument("--stream", action="store_true", help="print text as it is generated")
    mode.add_argument("--async", action="store_true", dest="detach", help="print the id, and leave")
    run.add_argument("--timeout", type=int, metavar="MS", help="bound on the execution, in ms")
    run.add_argument("--metadata", metavar="JSON", help="an object, returned with the result")
    run.add_argument("--json", action="store_true", help="print the whole answer, not its data")
    run.set_defaults(handler=run_workflow)

    executions = commands.add_parser("executions", help="look at or cancel an execution")
    actions = executions.add_subparsers(metavar="ACTION", required=True)
    for name, text, handler in (
        ("get", "print an execution's record", show_execution),
        ("cancel", "cancel an execution", cancel_execution),
    ):
        action = actions.add_parser(name, parents=[server], help=text)
        action.add_argument("id", metavar="ID")
        action.set_defaults(handler=handler)

    health = commands.add_parser("health", parents=[server], help="print the server's health")
    health.set_defaults(handler=show_health)
    return parser, commands


def run_workflow(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe run`."""
    workflow_input = _json_object("--input", _input_text(args.input))
    metadata = None if args.metadata is None else _json_object("--metadata", args.metadata)
    if args.detach:
        info = client.execute_async(
            args.workflow, workflow_input, timeout_ms=args.timeout, metadata=metadata
        )
        _print(info.model_dump(mode="json") if args.json else info.id)
        return OK
    # Without --stream the events are followed as well: only they tell the id early enough for an
    # interrupt to cancel the execution.
    stream = client.execute_stream(
        args.workflow, workflow_input, timeout_ms=args.timeout, metadata=metadata
    )
    try:
        follow = _follow_text if args.stream else _follow_silently
        follow(stream, as_json=args.json)
    except (KeyboardInterrupt, BrokenPipeError):
        _cancel_interrupted(client, stream.execution_id)
        raise
    return OK


def show_execution(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions get`."""
    _print(client.get_execution(args.id).model_dump(mode="json"))
    return OK


def cancel_execution(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions cancel`."""
    client.cancel_execution(args.id)
    return OK


def show_health(client: InferPipe, _: argparse.Namespace) -> int:
    """`inferpipe health`."""
    health = client.health()
    _print(health.model_dump(mode="json"))
    return OK if health.status == "healthy" else FAILED


def _follow_silently(stream: ExecutionStream, *, as_json: bool) -> None:
    try:
        for _ in stream.events():
            pass
    except ExecutionFailedError as error:
        if as_json:
            _print(error.result.model_dump(mode="json"))
        raise
    _print_result(stream.result, as_json=as_json)


def _follow_text(stream: ExecutionStream, *, as_json: bool) -> None:
    has_text = False
    try:
        for event in stream.events():
            if as_json:
                _print({"event": event.type, "id": event.id, "data": event.data})
            else:
                has_text = _print_text(event) or has_text
    finally:
        if has_text:
            _write("\n")
    if not (has_text or as_json):
        # A workflow that generates no text still has its data.
        _print_result(completed(stream.result), as_json=False)


def _print_text(event: StreamEvent) -> bool:
    chunk = to_chunk(event)
    if chunk is not None:
        _write(chunk.data)
    elif event.type == "step.retrying":
        _complain("a step is tried again: its text so far is void, and starts anew", OK)
    elif event.type == "gap":
        _complain("some events are no longer kept: the text has a gap", OK)
    return chunk is not None and bool(chunk.data)


def _print_result(result: ExecutionResult, *, as_json: bool) -> None:
    _print(result.model_dump(mode="json") if as_json else result.data)


def _print(value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    _write(text + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _cancel_interrupted(client: InferPipe, execution_id: str | None) -> None:
    if execution_id is None:
        return
    try:
        client.cancel_execution(execution_id)
    except InferPipeError as error:
        _complain(f"execution {execution_id} was not cancelled: {error}", OK)
    else:
        _complain(f"execution {execution_id} is being cancelled", OK)


def _input_text(argument: str) -> str:
    try:
        if argument == "-":
            return sys.stdin.read()
        if argument.startswith("@"):
            return Path(argument[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--input {argument}: {error}") from error
    return argument


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{option} is not JSON ({error}); see --help") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f'{option} must be a JSON object such as {{"text": "hello"}}')
    return value


def _report(error: InferPipeError) -> int:
    match error:
        case ExecutionFailedError():
            return _complain(str(error), FAILED)
        case InvalidArgumentError():
            return _complain(str(error), USAGE)
        case InferPipeTimeoutError():
            return _complain(f"{error}; what was accepted goes on: try again later", UNREACHABLE)
        case InferPipeConnectionError():
            hint = "start the server with `inferpipe up`, or set --base-url or INFERPIPE_BASE_URL"
            return _complain(f"{error}; {hint}", UNREACHABLE)
        case ApiStatusError():
            hint = HINTS.get(error.status, "")
            return _complain(f"{error}; {hint}" if hint else str(error), REFUSED)
        case _:
            return _complain(str(error), REFUSED)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"inferpipe: {' '.join(message.split())}\n")
    return code


def _add_server_commands(commands: Any, first_word: str) -> None:
    """Add what is needed of the server's commands.

    Finding and importing them is slow (Ray takes a second), so a command of the client's own skips
    both: only the one that is asked for is imported, or all of them for `--help`.
    """
    if first_word in commands.choices or first_word == "--version":
        return
    found = {entry.name: entry for entry in entry_points(group=COMMAND_GROUP)}
    loads_all = first_word.startswith("-")
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
        return _complain(f"this command {INSTALL_HINT}{self._reason}", USAGE)


if __name__ == "__main__":
    raise SystemExit(main())

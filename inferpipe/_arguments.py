"""The command's arguments: one table, from which the parser, its page and the completions are made.

Owns names, help texts and which function does the work. Invariant: no argument takes a secret: what
stands on a command line can be read by everybody on the machine.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

from inferpipe import __version__
from inferpipe import _commands as commands
from inferpipe._completion import SHELLS
from inferpipe._exit_codes import MEANINGS
from inferpipe.client import InferPipe
from inferpipe.wire import ExecutionStatus

Handler = Callable[[InferPipe, argparse.Namespace], int]

LIMIT_DEFAULT = 20
ENVIRONMENT = "INFERPIPE_API_KEY, _WORKSPACE_ID, _BASE_URL, _TIMEOUT_S, _RETRIES, _ENVIRONMENT"
EPILOG = (
    "exit codes:\n"
    + "".join(f"  {code:<4} {meaning}\n" for code, meaning in MEANINGS.items())
    + f"\nenvironment: {ENVIRONMENT}\n"
)
_SPAN = re.compile(r"([1-9][0-9]{0,5})([hdw])")


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument, as `add_argument` takes it."""

    names: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `is_listing` and the like are arguments that several share."""

    name: str
    help: str
    handler: Handler
    arguments: Sequence[Argument] = ()


def arg(*names: str, **options: Any) -> Argument:
    """Return an argument."""
    return Argument(names, options)


def moment(text: str) -> datetime:
    """Read a day or an RFC 3339 moment; a day begins at midnight UTC."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("a day as YYYY-MM-DD, or an RFC 3339 moment") from error
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def span(text: str) -> timedelta:
    """Read a span such as `12h`, `30d` or `8w`."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError("a number and h, d or w, such as 30d")
    return int(found[1]) * commands.SPANS[found[2]]


def count(text: str) -> int:
    """Read a number above 0."""
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0):
        raise argparse.ArgumentTypeError("a number above 0")
    return int(text[:9])


ID = arg("id", metavar="ID")
LIMIT = arg("--limit", type=count, default=LIMIT_DEFAULT, metavar="N", help="at most so many (20)")
FILE = arg("file", metavar="FILE", help="a definition in YAML or JSON; - for stdin")
DELIVERY_STATUS = arg(
    "--status",
    choices=("pending", "delivered", "failed", "dead"),
    help="those in this state alone",
)
WORKFLOW_ID = arg("--workflow-id", metavar="ID", help="of this workflow alone")

RUN = Command(
    "run",
    "run a workflow, print its data",
    commands.run_workflow,
    (
        arg("workflow", metavar="WORKFLOW", help="the workflow's id"),
        arg("--input", default="{}", metavar="JSON|@FILE|-", help="an object (default {})"),
        arg("--stream", action="store_true", help="print text as it is generated"),
        arg("--async", action="store_true", dest="detach", help="print the id, and leave"),
        arg("--timeout", type=int, metavar="MS", help="bound on the execution, in ms"),
        arg("--metadata", metavar="JSON", help="an object, returned with the result"),
    ),
)

GROUPS: dict[str, tuple[str, Sequence[Command]]] = {
    "executions": (
        "look at and steer what was started",
        (
            Command(
                "list",
                "list executions, newest first",
                commands.list_executions,
                (
                    WORKFLOW_ID,
                    arg("--status", choices=get_args(ExecutionStatus), help="in this state alone"),
                    LIMIT,
                ),
            ),
            Command("get", "print an execution's record", commands.show_execution, (ID,)),
            Command("cancel", "cancel an execution", commands.cancel_execution, (ID,)),
            Command(
                "follow",
                "print an execution's text as it is generated",
                commands.follow_execution,
                (
                    ID,
                    arg("--after", type=int, metavar="EVENT", help="go on after this event's id"),
                ),
            ),
            Command(
                "retry",
                "run an ended execution again, print the new id",
                commands.retry_execution,
                (
                    ID,
                    arg("--from-step", metavar="STEP", help="keep the results of those before it"),
                ),
            ),
            Command(
                "signal",
                "answer a step that waits",
                commands.signal_execution,
                (
                    ID,
                    arg("name", metavar="NAME", help="the signal's name"),
                    arg("--data", metavar="JSON|@FILE|-", help="what to tell it"),
                ),
            ),
        ),
    ),
    "workflows": (
        "manage definitions",
        (
            Command("list", "list the latest versions", commands.list_workflows, ()),
            Command(
                "get",
                "print a definition",
                commands.show_workflow,
                (ID, arg("--version", type=int, metavar="N", help="default: the latest")),
            ),
            Command("versions", "list its versions", commands.list_versions, (ID,)),
            Command("put", "store a definition", commands.put_workflow, (ID, FILE)),
            Command(
                "validate",
                "say what is wrong with a definition",
                commands.validate_workflow,
                (ID, FILE),
            ),
            Command("delete", "remove a definition", commands.delete_workflow, (ID,)),
        ),
    ),
    "keys": (
        "manage API keys (needs an admin key)",
        (
            Command("list", "list the workspace's keys", commands.list_keys, ()),
            Command(
                "create",
                "make a key and print it, once",
                commands.create_key,
                (
                    arg("name", metavar="NAME", help="to know it by"),
                    arg(
                        "--scope",
                        action="append",
                        choices=("read", "execute", "admin"),
                        help="may be given again (default: execute)",
                    ),
                    arg("--expires-in", type=span, metavar="SPAN", help="such as 30d; never"),
                ),
            ),
            Command("revoke", "make a key worthless", commands.revoke_key, (ID,)),
        ),
    ),
    "webhooks": (
        "manage webhooks (needs an admin key)",
        (
            Command("list", "list the endpoints", commands.list_webhooks, ()),
            Command(
                "create",
                "make an endpoint and print its secret, once",
                commands.create_webhook,
                (
                    arg("url", metavar="URL", help="where deliveries go"),
                    arg(
                        "--event",
                        action="append",
                        metavar="NAME",
                        help="such as workflow.completed; may be given again (default: all)",
                    ),
                    WORKFLOW_ID,
                ),
            ),
            Command("test", "send a webhook.test", commands.test_webhook, (ID,)),
            Command(
                "deliveries",
                "list what was sent",
                commands.list_deliveries,
                (ID, DELIVERY_STATUS, LIMIT),
            ),
            Command(
                "replay", "send deliveries again", commands.replay_webhook, (ID, DELIVERY_STATUS)
            ),
            Command("delete", "remove an endpoint", commands.delete_webhook, (ID,)),
        ),
    ),
}

USAGE = Command(
    "usage",
    "print the workspace's tokens",
    commands.show_usage,
    (
        arg("--from", type=moment, dest="from_", metavar="DAY", help="first day or moment"),
        arg("--to", type=moment, metavar="DAY", help="last day or moment"),
        arg(
            "--group-by",
            choices=("workflow", "key", "day"),
            default="workflow",
            help="one row for each (default: workflow)",
        ),
    ),
)
HEALTH = Command("health", "print the server's health", commands.show_health)

DOCTOR_HELP = "say what runs here, what is wrong, and what to do"
COMPLETION_HELP = "print a shell's completion script"
SHARED = (
    arg("--base-url", metavar="URL", help="default: http://127.0.0.1:8000"),
    arg("--api-key-file", type=Path, metavar="FILE", help="default: INFERPIPE_API_KEY"),
    arg("--workspace", metavar="ID", help="refuse a key of another workspace"),
    arg("--environment", metavar="NAME", help="read INFERPIPE_<NAME>_* first"),
    arg("--json", action="store_true", help="print JSON; of a list or stream, a line for each"),
)


def build_parser() -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser with the client's commands, and the place where further ones go."""
    parser = argparse.ArgumentParser(
        prog="inferpipe",
        description="Run LLM workflows on an inferpipe server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"inferpipe {__version__}")
    places = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    server = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add(server.add_argument_group("every command"), SHARED)

    _add_command(places, RUN, server)
    for name, (text, actions) in GROUPS.items():
        group = places.add_parser(name, help=text, description=text, allow_abbrev=False)
        inner = group.add_subparsers(metavar="ACTION", required=True)
        for action in actions:
            _add_command(inner, action, server)
    _add_command(places, USAGE, server)
    _add_command(places, HEALTH, server)
    doctor = places.add_parser(
        "doctor", parents=[server], help=DOCTOR_HELP, description=DOCTOR_HELP, allow_abbrev=False
    )
    _add(doctor, (arg("--quick", action="store_true", help="do not import the engine"),))
    doctor.set_defaults(is_doctor=True)
    completion = places.add_parser(
        "completion", help=COMPLETION_HELP, description=COMPLETION_HELP, allow_abbrev=False
    )
    _add(completion, (arg("shell", choices=SHELLS),))
    completion.set_defaults(is_completion=True)
    return parser, places


def _add_command(places: Any, command: Command, server: argparse.ArgumentParser) -> None:
    parser = places.add_parser(
        command.name,
        parents=[server],
        help=command.help,
        description=command.help,
        allow_abbrev=False,
    )
    exclusive = parser.add_mutually_exclusive_group() if command is RUN else parser
    for argument in command.arguments:
        target = exclusive if argument.names[0] in {"--stream", "--async"} else parser
        target.add_argument(*argument.names, **argument.options)
    parser.set_defaults(handler=command.handler)


def _add(target: Any, arguments: Sequence[Argument]) -> None:
    for argument in arguments:
        target.add_argument(*argument.names, **argument.options)

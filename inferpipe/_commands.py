"""What the client's commands do, once their arguments are read.

Owns one function per command: arguments in, calls of the SDK, lines out, exit code. Invariant: an
interrupt of a command that started an execution cancels it, one of a command that only looks does
not.
"""

import argparse
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from inferpipe._exit_codes import FAILED, OK
from inferpipe._stream import StreamEvent, completed, to_chunk
from inferpipe._terminal import Progress, complain, print_rows, print_value, write
from inferpipe.client import InferPipe
from inferpipe.errors import ExecutionFailedError, InferPipeError, InvalidArgumentError
from inferpipe.streams import ExecutionStream
from inferpipe.wire import ExecutionResult, UsageItem

EXECUTION_COLUMNS = ("id", "status", "workflow_id", "created_at", "error")
WORKFLOW_COLUMNS = ("id", "version", "created_at")
KEY_COLUMNS = ("id", "name", "scopes", "prefix", "expires_at")
WEBHOOK_COLUMNS = ("id", "url", "events", "workflow_id", "enabled", "disabled_reason")
DELIVERY_COLUMNS = ("id", "event_id", "event_type", "status", "next_attempt_at")
USAGE_COLUMNS = ("requests", "prompt_tokens", "completion_tokens", "total_tokens")
SPANS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def run_workflow(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe run`."""
    workflow_input = json_object("--input", text_of("--input", args.input))
    metadata = None if args.metadata is None else json_object("--metadata", args.metadata)
    if args.detach:
        info = client.execute_async(
            args.workflow, workflow_input, timeout_ms=args.timeout, metadata=metadata
        )
        print_value(info if args.json else info.id)
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


def list_executions(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions list`."""
    found = client.executions.list(
        workflow_id=args.workflow_id, status=args.status, page_size=min(args.limit, 200)
    )
    print_rows(found, EXECUTION_COLUMNS, as_json=args.json, limit=args.limit)
    return OK


def show_execution(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions get`."""
    print_value(client.executions.get(args.id))
    return OK


def cancel_execution(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions cancel`."""
    client.executions.cancel(args.id)
    return OK


def follow_execution(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions follow`."""
    stream = client.executions.follow(args.id, after=args.after)
    try:
        _follow_text(stream, as_json=args.json)
    except KeyboardInterrupt:
        complain(f"execution {args.id} goes on; to stop it: inferpipe executions cancel {args.id}")
        raise
    return OK


def retry_execution(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions retry`."""
    info = client.executions.retry(args.id, from_step=args.from_step)
    print_value(info if args.json else info.id)
    return OK


def signal_execution(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe executions signal`."""
    data = None if args.data is None else parsed("--data", text_of("--data", args.data))
    client.executions.signal(args.id, args.name, data)
    return OK


def list_workflows(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe workflows list`."""
    print_rows(client.workflows.list(), WORKFLOW_COLUMNS, as_json=args.json)
    return OK


def list_versions(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe workflows versions`."""
    print_rows(client.workflows.versions(args.id), WORKFLOW_COLUMNS, as_json=args.json)
    return OK


def show_workflow(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe workflows get`."""
    print_value(client.workflows.get(args.id, version=args.version))
    return OK


def put_workflow(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe workflows put`; JSON is YAML, so that the text goes as it is."""
    stored = client.workflows.put(args.id, text_of("FILE", file_argument(args.file)))
    print_value(stored if args.json else f"{stored.id} version {stored.version}")
    return OK


def validate_workflow(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe workflows validate`."""
    verdict = client.workflows.validate(args.id, text_of("FILE", file_argument(args.file)))
    if args.json:
        print_value(verdict)
    for problem in () if args.json else verdict.errors:
        write(f"{'.'.join(str(part) for part in problem.loc) or 'definition'}: {problem.msg}\n")
    return OK if verdict.valid else FAILED


def delete_workflow(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe workflows delete`."""
    client.workflows.delete(args.id)
    return OK


def list_keys(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe keys list`."""
    print_rows(client.keys.list(), KEY_COLUMNS, as_json=args.json)
    return OK


def create_key(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe keys create`; the key alone on stdout, so that it can go into a file."""
    expires_at = None if args.expires_in is None else datetime.now(UTC) + args.expires_in
    made = client.keys.create(args.name, args.scope or ["execute"], expires_at=expires_at)
    if made.key is None:
        # The first answer was lost on its way, and the server shows a secret once.
        client.keys.revoke(made.id)
        return complain("the answer with the key was lost; the key is revoked: run this again", 1)
    print_value(made if args.json else made.key)
    if not args.json:
        complain(f"key {made.id}, shown once; to revoke it: inferpipe keys revoke {made.id}")
    return OK


def revoke_key(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe keys revoke`."""
    client.keys.revoke(args.id)
    return OK


def list_webhooks(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe webhooks list`."""
    print_rows(client.webhooks.list(), WEBHOOK_COLUMNS, as_json=args.json)
    return OK


def create_webhook(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe webhooks create`; the secret alone on stdout."""
    scope = {} if args.workflow_id is None else {"workflow_id": args.workflow_id}
    made = client.webhooks.create(args.url, args.event or ["*"], **scope)
    print_value(made if args.json else made.secret)
    if not args.json:
        complain(f"webhook {made.id}; its secret is shown once")
    return OK


def delete_webhook(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe webhooks delete`."""
    client.webhooks.delete(args.id)
    return OK


def test_webhook(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe webhooks test`."""
    print_value(client.webhooks.test(args.id))
    return OK


def list_deliveries(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe webhooks deliveries`."""
    found = client.webhooks.deliveries(args.id, status=args.status)
    print_rows(found, DELIVERY_COLUMNS, as_json=args.json, limit=args.limit)
    return OK


def replay_webhook(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe webhooks replay`."""
    done = client.webhooks.replay(args.id, status=args.status)
    rest = "" if done.is_complete else ", not all: run this again"
    print_value(done if args.json else f"{done.replayed} deliveries are sent again{rest}")
    return OK


def show_usage(client: InferPipe, args: argparse.Namespace) -> int:
    """`inferpipe usage`."""
    report = client.usage(from_=args.from_, to=args.to, group_by=args.group_by)
    if args.json:
        print_value(report)
        return OK
    write("\t".join([args.group_by, *USAGE_COLUMNS]) + "\n")
    for item in report.items:
        write(_usage_row(str(getattr(item, args.group_by, None) or "-"), item))
    write(_usage_row("total", report.totals))
    return OK


def show_health(client: InferPipe, _: argparse.Namespace) -> int:
    """`inferpipe health`."""
    health = client.health()
    print_value(health)
    return OK if health.status == "healthy" else FAILED


def text_of(option: str, argument: str) -> str:
    """The text that an argument names: `@FILE`, `-` for stdin, else itself."""
    try:
        if argument == "-":
            return sys.stdin.read()
        if argument.startswith("@"):
            return Path(argument[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{option} {argument}: {error}") from error
    return argument


def file_argument(name: str) -> str:
    """A file's name as `text_of` takes it."""
    return name if name == "-" else f"@{name}"


def parsed(option: str, text: str) -> object:
    """The text as JSON."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{option} is not JSON ({error}); see --help") from error
    return value


def json_object(option: str, text: str) -> dict[str, Any]:
    """The text as a JSON object."""
    value = parsed(option, text)
    if not isinstance(value, dict):
        raise InvalidArgumentError(f'{option} must be a JSON object such as {{"text": "hello"}}')
    return value


def _follow_silently(stream: ExecutionStream, *, as_json: bool) -> None:
    progress = Progress()
    try:
        for event in stream.events():
            progress.show(_doing(event))
    except ExecutionFailedError as error:
        progress.clear()
        if as_json:
            print_value(error.result)
        raise
    finally:
        progress.clear()
    _print_result(stream.result, as_json=as_json)


def _follow_text(stream: ExecutionStream, *, as_json: bool) -> None:
    has_text = False
    try:
        for event in stream.events():
            if as_json:
                print_value({"event": event.type, "id": event.id, "data": event.data})
            else:
                has_text = _print_text(event) or has_text
    finally:
        if has_text:
            write("\n")
    if not (has_text or as_json):
        # A workflow that generates no text still has its data.
        _print_result(completed(stream.result), as_json=False)


def _doing(event: StreamEvent) -> str:
    step = event.data.get("step")
    return f"{event.type} {step}" if step else event.type


def _print_text(event: StreamEvent) -> bool:
    chunk = to_chunk(event)
    if chunk is not None:
        write(chunk.data)
    elif event.type == "step.retrying":
        complain("a step is tried again: its text so far is void, and starts anew")
    elif event.type == "gap":
        complain("some events are no longer kept: the text has a gap")
    return chunk is not None and bool(chunk.data)


def _print_result(result: ExecutionResult, *, as_json: bool) -> None:
    print_value(result if as_json else result.data)


def _cancel_interrupted(client: InferPipe, execution_id: str | None) -> None:
    if execution_id is None:
        return
    try:
        client.executions.cancel(execution_id)
    except InferPipeError as error:
        complain(f"execution {execution_id} was not cancelled: {error}")
    else:
        complain(f"execution {execution_id} is being cancelled")


def _usage_row(name: str, item: UsageItem) -> str:
    counts = (str(getattr(item, column, 0)) for column in USAGE_COLUMNS)
    return "\t".join((name, *counts)) + "\n"

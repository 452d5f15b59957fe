"""What a client offers beside executing: `client.executions`, `client.workflows` and the rest.

Owns the methods that users call, for blocking code; `async_resources` is the same for asyncio, word
for word but for `async` and `await` (a test compares the two). What is sent and what an answer
means is in `_operations`. Invariant: a list is read page by page, while it is iterated over.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Unpack

from inferpipe import _operations as operations
from inferpipe._calls import execution_call
from inferpipe._config import KeyLimits, WebhookOptions
from inferpipe._http import Runner
from inferpipe._operations import Definition
from inferpipe.streams import ExecutionStream
from inferpipe.wire import (
    DeliveryStatus,
    DeliveryView,
    ExecutionInfo,
    ExecutionRecord,
    ExecutionStatus,
    HostView,
    KeyView,
    Replayed,
    SessionMessageView,
    SessionView,
    StreamTokenView,
    Validation,
    WebhookSecret,
    WebhookView,
    WorkflowView,
    WorkspaceView,
)


class Executions:
    """`client.executions`: look at, follow and steer what has been started."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def get(self, execution_id: str) -> ExecutionRecord:
        """Return all that is known of an execution now."""
        return self._runner.ask(operations.get_execution(execution_id))

    def list(
        self,
        *,
        workflow_id: str | None = None,
        status: ExecutionStatus | None = None,
        page_size: int | None = None,
    ) -> Iterator[ExecutionRecord]:
        """Yield executions, newest first, without their `data` and `steps`."""
        return self._runner.items(
            lambda cursor: operations.list_executions(workflow_id, status, page_size, cursor)
        )

    def cancel(self, execution_id: str) -> None:
        """Ask for a cancellation; ConflictError where the execution has ended already."""
        self._runner.ask(operations.cancel_execution(execution_id))

    def retry(self, execution_id: str, *, from_step: str | None = None) -> ExecutionInfo:
        """Run an ended execution again as a new one.

        Args:
            execution_id: of an execution that has ended.
            from_step: the results of the steps before it are kept.
        """
        return self._runner.ask(operations.retry_execution(execution_id, from_step))

    def signal(self, execution_id: str, name: str, data: Any = None) -> None:
        """Answer the step that waits for the signal of this name."""
        self._runner.ask(operations.signal_execution(execution_id, name, data))

    def follow(self, execution_id: str, *, after: int | None = None) -> ExecutionStream:
        """Return a stream of an execution that was started elsewhere.

        Args:
            execution_id: it may have ended: then its events are read from the journal.
            after: the id of the last event that was seen; None begins with the first.
        """
        call = execution_call(execution_id, "/stream")
        return ExecutionStream(call, self._runner, execution_id, after)


class Workflows:
    """`client.workflows`: definitions by immutable version."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def put(self, workflow_id: str, definition: Definition) -> WorkflowView:
        """Store a definition as the next version; an unchanged one keeps its version.

        Args:
            workflow_id: the definition's `id`, if it has one, must be the same.
            definition: an object, or the text of a YAML file.

        Raises:
            UnprocessableError: `problem.errors` says which step is wrong and why.
        """
        return self._runner.ask(operations.put_workflow(workflow_id, definition))

    def get(self, workflow_id: str, *, version: int | None = None) -> WorkflowView:
        """Return a definition, the latest version where none is named."""
        return self._runner.ask(operations.get_workflow(workflow_id, version))

    def list(self) -> Iterator[WorkflowView]:
        """Yield the latest versions of the workspace's own and of the shipped definitions."""
        return self._runner.items(operations.list_workflows)

    def versions(self, workflow_id: str) -> Iterator[WorkflowView]:
        """Yield every version of a definition, newest first."""
        return self._runner.items(lambda cursor: operations.list_versions(workflow_id, cursor))

    def delete(self, workflow_id: str) -> None:
        """Remove a definition; running executions keep theirs."""
        self._runner.ask(operations.delete_workflow(workflow_id))

    def validate(self, workflow_id: str, definition: Definition) -> Validation:
        """Check a definition without storing it."""
        return self._runner.ask(operations.validate_workflow(workflow_id, definition))


class Keys:
    """`client.keys`: who may call; needs an admin key."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def create(
        self,
        name: str,
        scopes: Sequence[Literal["read", "execute", "admin"]],
        *,
        expires_at: datetime | None = None,
        **limits: Unpack[KeyLimits],
    ) -> KeyView:
        """Make a key of the caller's workspace; `key` holds it, here and never again."""
        return self._runner.ask(operations.create_key(name, scopes, expires_at, limits))

    def list(self) -> Iterator[KeyView]:
        """Yield the keys of the workspace, without the keys themselves."""
        return self._runner.items(operations.list_keys)

    def revoke(self, key_id: str) -> None:
        """Make a key worthless, everywhere within a second."""
        self._runner.ask(operations.revoke_key(key_id))


class Workspaces:
    """`client.workspaces`: tenants; needs an admin key of the first workspace."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def create(self, workspace_id: str, *, name: str | None = None) -> WorkspaceView:
        """Make a workspace; `api_key` holds its first admin key, here and never again."""
        return self._runner.ask(operations.create_workspace(workspace_id, name))

    def list(self) -> Iterator[WorkspaceView]:
        """Yield all workspaces, by id."""
        return self._runner.items(operations.list_workspaces)


class Webhooks:
    """`client.webhooks`: endpoints that hear of what ends, and what was sent to them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def create(
        self, url: str, events: Sequence[str], **options: Unpack[WebhookOptions]
    ) -> WebhookView:
        """Make an endpoint; `secret` holds its signing secret, here and at its rotation only.

        Args:
            url: refused where the server may not call it.
            events: such as `workflow.completed`, or `["*"]` for all.
            options: what else there is to say of it.
        """
        return self._runner.ask(operations.create_webhook(url, events, options))

    def get(self, webhook_id: str) -> WebhookView:
        """Return an endpoint."""
        return self._runner.ask(operations.get_webhook(webhook_id))

    def list(self) -> Iterator[WebhookView]:
        """Yield the endpoints of the workspace."""
        return self._runner.items(operations.list_webhooks)

    def update(self, webhook_id: str, changes: Mapping[str, Any]) -> WebhookView:
        """Change some of `url, events, modes, workflow_id, description, headers, enabled`."""
        return self._runner.ask(operations.update_webhook(webhook_id, changes))

    def delete(self, webhook_id: str) -> None:
        """Remove an endpoint; what is due to it is dropped."""
        self._runner.ask(operations.delete_webhook(webhook_id))

    def test(self, webhook_id: str) -> DeliveryView:
        """Send it a `webhook.test`; return its delivery."""
        return self._runner.ask(operations.test_webhook(webhook_id))

    def rotate_secret(self, webhook_id: str, *, overlap_ms: int | None = None) -> WebhookSecret:
        """Make a new secret; for `overlap_ms` deliveries carry a signature of the old one too."""
        return self._runner.ask(operations.rotate_secret(webhook_id, overlap_ms))

    def deliveries(
        self,
        webhook_id: str,
        *,
        status: DeliveryStatus | None = None,
        page_size: int | None = None,
    ) -> Iterator[DeliveryView]:
        """Yield what was sent to an endpoint, newest first, with every try."""
        return self._runner.items(
            lambda cursor: operations.list_deliveries(webhook_id, status, page_size, cursor)
        )

    def delivery(self, delivery_id: str) -> DeliveryView:
        """Return one delivery, with every try."""
        return self._runner.ask(operations.get_delivery(delivery_id))

    def replay(
        self,
        webhook_id: str,
        *,
        status: DeliveryStatus | None = None,
        from_: datetime | None = None,
        to: datetime | None = None,
    ) -> Replayed:
        """Send an endpoint's deliveries again: those of a status, made between two moments."""
        return self._runner.ask(operations.replay_webhook(webhook_id, status, from_, to))

    def replay_delivery(self, delivery_id: str) -> DeliveryView:
        """Send one delivery again, whatever became of it."""
        return self._runner.ask(operations.replay_delivery(delivery_id))


class StreamTokens:
    """`client.stream_tokens`: for browsers, whose `EventSource` sends no header."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def create(self, resource: str, *, ttl_s: int | None = None) -> StreamTokenView:
        """Make a short-lived token for `?token=`, good for one path such as `/stream/user/u1`."""
        return self._runner.ask(operations.create_stream_token(resource, ttl_s))


class Hosts:
    """`client.hosts`: the model replicas, for those who choose one for themselves."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def list(self) -> Sequence[HostView]:
        """Return every host heard of lately, ready ones first."""
        return self._runner.ask(operations.list_hosts())

    def select(
        self,
        model: str,
        *,
        min_stake: str | None = None,
        max_latency: int | None = None,
        region: str | None = None,
    ) -> HostView:
        """Return the best host now; `max_latency` is in ms, `region` a wish, the rest conditions.

        Raises:
            NotFoundError: no host serves the model.
            OverloadedError: none that serves it satisfies the conditions.
        """
        return self._runner.ask(operations.select_host(model, min_stake, max_latency, region))


class Sessions:
    """`client.sessions`: conversations; their turns are spoken by an `InferenceManager`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def create(self, model: str, *, system: str | None = None) -> SessionView:
        """Begin a session."""
        return self._runner.ask(operations.create_session(model, system))

    def get(self, session_id: str) -> SessionView:
        """Return a session without its messages."""
        return self._runner.ask(operations.get_session(session_id))

    def messages(self, session_id: str) -> Iterator[SessionMessageView]:
        """Yield what was said, the system message first."""
        return self._runner.items(
            lambda cursor: operations.list_session_messages(session_id, cursor)
        )

    def end(self, session_id: str) -> None:
        """End a session; all it holds is forgotten."""
        self._runner.ask(operations.end_session(session_id))

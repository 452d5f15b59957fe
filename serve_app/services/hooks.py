"""Webhooks that come in: their secrets, and what becomes of a delivery.

Owns the check of a delivery and the workspace border of its secrets. Starts nothing: a delivery
that is right becomes an event of a name that nobody else can send. Invariant: a secret is given out
once, by the call that made it, and stored sealed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson

from serve_app.core.app_events import AppEvent
from serve_app.core.errors import (
    ChangedMeanwhileError,
    InvalidRequestError,
    SealBrokenError,
    UnknownWorkflowError,
)
from serve_app.core.hooks import (
    HookSecrets,
    check_secret,
    hook_event_name,
    refused,
    verified_event_id,
)
from serve_app.core.inference import JsonValue
from serve_app.core.triggers import HookTrigger
from serve_app.core.webhooks import OVERLAP_MAX_MS, Secret, new_secret
from serve_app.event_ports import HookStore
from serve_app.ports import Clock, Entropy, Vault, WorkflowCatalog
from serve_app.services.events import Events

_TRIES_MAX = 20  # each lost race means that somebody else's change got in
_NO_SECRETS = HookSecrets(())


@dataclass(frozen=True, slots=True)
class Delivery:
    """What somebody sent to a hook; header names in lower case."""

    workspace: str
    workflow_id: str
    headers: Mapping[str, str]
    body: bytes


class Hooks:
    """The hooks of all workflows that have one."""

    def __init__(  # noqa: PLR0913 - one argument per port
        self,
        store: HookStore,
        catalog: WorkflowCatalog,
        events: Events,
        vault: Vault,
        clock: Clock,
        entropy: Entropy,
        *,
        tolerance_ms: int,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._events = events
        self._vault = vault
        self._clock = clock
        self._entropy = entropy
        self._tolerance_ms = tolerance_ms

    async def set_secret(
        self, workspace: str, workflow_id: str, given: str | None, overlap_ms: int
    ) -> str:
        """Give a workflow's hook a secret, a new one or the sender's; the old one overlaps.

        Raises:
            UnknownWorkflowError: there is none of this id in the workspace.
            InvalidRequestError: no secret, or no overlap.
            ChangedMeanwhileError: others change it at the same time.
        """
        if not 0 <= overlap_ms <= OVERLAP_MAX_MS:
            raise InvalidRequestError(f"overlap is a number of ms from 0 to {OVERLAP_MAX_MS}")
        await self._catalog.latest(workspace, workflow_id)
        made = new_secret(self._entropy.token(), self._entropy.token())
        value = made if given is None else check_secret(given)
        now_ms, context = self._clock.now_ms(), _context(workspace, workflow_id)
        for _ in range(_TRIES_MAX):
            present = await self._store.find(workspace, workflow_id)
            try:
                secrets = self._open(present, context)
            except SealBrokenError:
                secrets = _NO_SECRETS  # nothing can be verified with it any more
            rotated = secrets.rotated(value, now_ms, overlap_ms)
            pairs = [[one.value, one.expires_at_ms] for one in rotated.secrets]
            sealed = self._vault.seal(orjson.dumps(pairs), context)
            if await self._store.set(workspace, workflow_id, present, sealed):
                return value
        raise ChangedMeanwhileError("others change this hook at the same time; try again")

    async def drop_secret(self, workspace: str, workflow_id: str) -> None:
        """Let the hook take nothing any more.

        Raises:
            UnknownWorkflowError: it has none.
        """
        present = await self._store.find(workspace, workflow_id)
        if not present or not await self._store.set(workspace, workflow_id, present, ""):
            raise UnknownWorkflowError(f"workflow {workflow_id!r} has no hook with a secret")

    async def receive(self, delivery: Delivery, parse: Callable[[bytes], JsonValue]) -> str:
        """Take a delivery in, durable when this returns; the id of its event.

        `parse` reads the body, once it is known who sent it.

        Raises:
            UnauthorizedError: no such hook, no right signature, or too old.
            OverloadedError: too much waits already.
        """
        workspace, workflow_id = delivery.workspace, delivery.workflow_id
        event_id = await self._verified(delivery)
        event = AppEvent(
            workspace=workspace,
            name=hook_event_name(workflow_id),
            id=event_id,
            data=parse(delivery.body),
            ts=self._clock.now_ms(),
        )
        (event_id,) = await self._events.publish([event], None)
        return event_id

    async def _verified(self, delivery: Delivery) -> str:
        workspace, workflow_id = delivery.workspace, delivery.workflow_id
        try:
            _, workflow = await self._catalog.latest(workspace, workflow_id)
        except UnknownWorkflowError as error:
            raise refused() from error
        schemes = [one.scheme for one in workflow.triggers if isinstance(one, HookTrigger)]
        sealed = await self._store.find(workspace, workflow_id) if schemes else ""
        now_ms = self._clock.now_ms()
        secrets = self._open(sealed, _context(workspace, workflow_id)).live(now_ms)
        for scheme in schemes:
            if scheme.header in delivery.headers:
                times_ms = (now_ms, self._tolerance_ms)
                return verified_event_id(scheme, delivery.headers, delivery.body, secrets, times_ms)
        raise refused()

    def _open(self, sealed: str, context: str) -> HookSecrets:
        if not sealed:
            return _NO_SECRETS
        return HookSecrets(
            tuple(Secret(*one) for one in orjson.loads(self._vault.open(sealed, context)))
        )


def _context(workspace: str, workflow_id: str) -> str:
    return f"hook:{workspace}:{workflow_id}"

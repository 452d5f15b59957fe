"""What an owner does with webhooks: make, change, rotate, test, look, replay.

Owns the checks before anything is stored and the workspace border. Invariant: a secret is given out
once, by the call that made it; another workspace's ids are as unknown as those that never were.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import orjson

from serve_app.core.delivery import Delivery, DeliveryStatus
from serve_app.core.egress import Network, check_url
from serve_app.core.errors import (
    ChangedMeanwhileError,
    InvalidRequestError,
    SealBrokenError,
    UnknownDeliveryError,
    UnknownWebhookError,
)
from serve_app.core.webhooks import (
    OVERLAP_MAX_MS,
    TEST_EVENT,
    UNREADABLE,
    Secret,
    Webhook,
    WebhookSecrets,
    check_events,
    check_headers,
    event,
    new_secret,
    webhook_id,
)
from serve_app.ports import Clock, DeliveryQuery, DeliveryQueue, Entropy, Vault, WebhookStore
from serve_app.services.endings import deliver

REPLAY_MAX = 10_000  # deliveries sent again by one call
_REPLAY_PAGE = 200
_CHANGE_TRIES_MAX = 20  # each lost race means that somebody else's change got in


@dataclass(frozen=True, slots=True)
class WebhookWish:
    """Members as their owner gives them; None, in a change, leaves what is there.

    `is_for_all_workflows` takes a `workflow_id` away again; `is_undescribed` a description.
    """

    url: str | None = None
    events: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    workflow_id: str | None = None
    description: str | None = None
    headers: Mapping[str, str] | None = None
    enabled: bool | None = None
    is_for_all_workflows: bool = False
    is_undescribed: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A webhook and what of it is sealed; for whoever may configure."""

    webhook: Webhook
    secrets: WebhookSecrets = field(repr=False)

    @property
    def is_readable(self) -> bool:
        """Whether its secret and headers can be read; else it can be rotated, or deleted."""
        return bool(self.secrets.secrets)


@dataclass(frozen=True, slots=True)
class Replayed:
    """How many were sent again; `is_complete` is false where the bound was reached."""

    count: int
    is_complete: bool


class WebhookKeeper:
    """Opens and seals what of a webhook is encrypted; its id and workspace are the context."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def seal(self, webhook: Webhook, secrets: WebhookSecrets) -> Webhook:
        """The webhook with these secrets and headers."""
        data = {
            "secrets": [[one.value, one.expires_at_ms] for one in secrets.secrets],
            "headers": dict(secrets.headers),
        }
        return replace(webhook, sealed=self._vault.seal(orjson.dumps(data), _context(webhook)))

    def open(self, webhook: Webhook) -> WebhookSecrets:
        """Its secrets and headers.

        Raises:
            SealBrokenError: they were sealed under another cluster secret.
        """
        data = orjson.loads(self._vault.open(webhook.sealed, _context(webhook)))
        return WebhookSecrets(tuple(Secret(*one) for one in data["secrets"]), data["headers"])

    def show(self, webhook: Webhook) -> Shown:
        """The webhook as its owner sees it: one that cannot be read must not hide the others."""
        try:
            return Shown(webhook, self.open(webhook))
        except SealBrokenError:
            return Shown(webhook, UNREADABLE)


class Webhooks:
    """The use cases over one store of endpoints and one queue of deliveries."""

    def __init__(  # noqa: PLR0913 - one argument per port
        self,
        store: WebhookStore,
        queue: DeliveryQueue,
        keeper: WebhookKeeper,
        clock: Clock,
        entropy: Entropy,
        *,
        allowed: Sequence[Network],
        count_max: int,
    ) -> None:
        self._store = store
        self._queue = queue
        self._keeper = keeper
        self._clock = clock
        self._entropy = entropy
        self._allowed = allowed
        self._count_max = count_max

    async def create(self, workspace: str, wish: WebhookWish) -> Shown:
        """Make an endpoint with a secret of its own.

        Raises:
            EgressRefusedError: its URL shows that it may not be reached.
            InvalidRequestError: an event or a header is not possible.
            TooManyWebhooksError: the workspace has its fill.
        """
        token = self._entropy.token()
        partition = int(self._entropy.uniform() * self._queue.partition_count)
        bare = Webhook(
            id=webhook_id(partition, token),
            workspace=workspace,
            url="",
            events=(),
            modes=(),
            created_at_ms=self._clock.now_ms(),
            sealed="",
            revision=0,
        )
        secrets = WebhookSecrets((Secret(self._new_secret()),))
        shown = self._changed(Shown(bare, secrets), wish)
        if not await self._store.put(shown.webhook, self._count_max):
            raise ChangedMeanwhileError("this webhook is there already")
        return replace(shown, webhook=replace(shown.webhook, revision=1))

    async def all(self, workspace: str) -> Sequence[Shown]:
        """The endpoints of a workspace, oldest first."""
        return tuple(self._keeper.show(one) for one in await self._store.all(workspace))

    async def load(self, workspace: str, a_webhook_id: str) -> Shown:
        """One endpoint.

        Raises:
            UnknownWebhookError: there is none of this id in the workspace.
        """
        for webhook in await self._store.all(workspace):
            if webhook.id == a_webhook_id:
                return self._keeper.show(webhook)
        raise UnknownWebhookError(f"no webhook {a_webhook_id!r} in this workspace")

    async def change(self, workspace: str, a_webhook_id: str, wish: WebhookWish) -> Shown:
        """Change what the wish names. Raises as `create` and `load`.

        Raises:
            InvalidRequestError: new headers for one whose secret cannot be read.
        """
        return await self._store_change(
            workspace, a_webhook_id, lambda shown: self._changed(shown, wish)
        )

    async def rotate(self, workspace: str, a_webhook_id: str, overlap_ms: int) -> str:
        """Give an endpoint a new secret; the present one signs beside it for the overlap.

        An overlap that is still running ends. Raises as `load`.
        """
        if not 0 <= overlap_ms <= OVERLAP_MAX_MS:
            raise InvalidRequestError(f"overlap is a number of ms from 0 to {OVERLAP_MAX_MS}")
        value = self._new_secret()

        def rotated(shown: Shown) -> Shown:
            secrets = shown.secrets.rotated(value, self._clock.now_ms(), overlap_ms)
            return Shown(self._keeper.seal(shown.webhook, secrets), secrets)

        await self._store_change(workspace, a_webhook_id, rotated)
        return value

    async def delete(self, workspace: str, a_webhook_id: str) -> None:
        """Delete an endpoint and its deliveries. Raises as `load`."""
        if not await self._store.remove(workspace, a_webhook_id):
            raise UnknownWebhookError(f"no webhook {a_webhook_id!r} in this workspace")
        await self._queue.forget(a_webhook_id)

    async def test(self, workspace: str, a_webhook_id: str) -> Delivery:
        """Send a `webhook.test`, whatever the filter, to a disabled endpoint too."""
        webhook = (await self.load(workspace, a_webhook_id)).webhook
        an_event_id = f"evt_{self._entropy.token()}"
        data = {"webhookId": webhook.id, "message": "A test from inferpipe: your endpoint works."}
        body = orjson.dumps(event(an_event_id, TEST_EVENT, self._clock.now_ms(), data))
        count = self._queue.partition_count
        outgoing = deliver(webhook, an_event_id, TEST_EVENT, body, count)
        await self._queue.accept(outgoing)
        made = await self._queue.delivery(outgoing.message_id)
        if made is None:
            raise UnknownWebhookError("the webhook was deleted meanwhile")
        return made

    async def deliveries(
        self, workspace: str, wanted: DeliveryQuery
    ) -> tuple[Sequence[Delivery], tuple[int, str] | None]:
        """A page of an endpoint's deliveries, newest first. Raises as `load`."""
        await self.load(workspace, wanted.webhook_id)
        return await self._queue.deliveries(wanted)

    async def delivery(self, workspace: str, a_delivery_id: str) -> Delivery:
        """One delivery.

        Raises:
            UnknownDeliveryError: there is none of this id in the workspace.
        """
        found = await self._queue.delivery(a_delivery_id)
        if found is None or found.workspace != workspace:
            raise UnknownDeliveryError(f"no delivery {a_delivery_id!r} in this workspace")
        return found

    async def replay(self, workspace: str, a_delivery_id: str) -> Delivery:
        """Send a delivery again, with the same `webhook-id`. Raises as `delivery`."""
        if await self._queue.replay(workspace, a_delivery_id) is None:
            raise UnknownDeliveryError(f"no delivery {a_delivery_id!r} in this workspace")
        return await self.delivery(workspace, a_delivery_id)

    async def replay_all(self, workspace: str, wanted: DeliveryQuery) -> Replayed:
        """Send again what has ended and matches, newest first, up to `REPLAY_MAX`.

        What is still due is left to its schedule, unless `wanted.status` names it. Raises as
        `load`.
        """
        await self.load(workspace, wanted.webhook_id)
        ended = {DeliveryStatus.DELIVERED, DeliveryStatus.DEAD}
        count, page = 0, replace(wanted, limit=_REPLAY_PAGE)
        while True:
            found, cursor = await self._queue.deliveries(page)
            ids = [one.id for one in found if wanted.status is not None or one.status in ended]
            answers = await asyncio.gather(*(self._queue.replay(workspace, one) for one in ids))
            count += answers.count(True)
            if cursor is None or count >= REPLAY_MAX:
                return Replayed(count, is_complete=cursor is None)
            page = replace(page, before=cursor)

    async def _store_change(
        self, workspace: str, a_webhook_id: str, change: Callable[[Shown], Shown]
    ) -> Shown:
        for _ in range(_CHANGE_TRIES_MAX):
            shown = change(await self.load(workspace, a_webhook_id))
            if await self._store.put(shown.webhook, self._count_max):
                return shown
        raise ChangedMeanwhileError("others change this webhook at the same time; try again")

    def _changed(self, shown: Shown, wish: WebhookWish) -> Shown:
        webhook = shown.webhook
        given: dict[str, object] = {
            "url": wish.url if wish.url is None else self._checked(wish.url),
            "events": wish.events if wish.events is None else check_events(wish.events),
            "modes": wish.modes if wish.modes is None else tuple(dict.fromkeys(wish.modes)),
            "workflow_id": wish.workflow_id,
            "description": wish.description,
            "enabled": wish.enabled,
        }
        members = {name: value for name, value in given.items() if value is not None}
        if wish.is_for_all_workflows:
            members["workflow_id"] = None
        if wish.is_undescribed:
            members["description"] = None
        if wish.enabled is not None:
            members["disabled_reason"] = None
        changed = replace(webhook, **members)  # type: ignore[arg-type]
        secrets = shown.secrets
        if not shown.is_readable:
            if wish.headers is not None:
                raise InvalidRequestError(
                    "this webhook's secret and headers cannot be read: rotate its secret first"
                )
            return Shown(changed, secrets)  # what is sealed stays, for the secret that opens it
        if wish.headers is not None:
            secrets = replace(secrets, headers=check_headers(wish.headers))
        return Shown(self._keeper.seal(changed, secrets), secrets)

    def _checked(self, url: str) -> str:
        check_url(url, self._allowed)
        return url

    def _new_secret(self) -> str:
        return new_secret(self._entropy.token(), self._entropy.token())


async def disable(store: WebhookStore, workspace: str, a_webhook_id: str, reason: str) -> None:
    """Disable an endpoint on our own account; harmless when it is gone or disabled already."""
    for _ in range(_CHANGE_TRIES_MAX):
        found = [one for one in await store.all(workspace) if one.id == a_webhook_id]
        if not found or not found[0].enabled:
            return
        if await store.put(replace(found[0], enabled=False, disabled_reason=reason), 0):
            return


def _context(webhook: Webhook) -> str:
    return f"webhook:{webhook.workspace}:{webhook.id}"

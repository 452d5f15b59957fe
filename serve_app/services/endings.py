"""What leaves with the commit that ends an execution: its event, for each webhook that hears it.

Owns the choice of endpoints and the payload. Sends nothing: the messages go into the outbox of the
execution's own partition and are relayed to each endpoint's queue. Invariant: asked again about the
same end it answers the same ids, so a delivery is made once however often it is decided.
"""

from collections.abc import Callable, Sequence

import orjson

from serve_app.core.execution import Execution
from serve_app.core.inference import JsonValue
from serve_app.core.journal import Outgoing
from serve_app.core.webhooks import (
    EVENT_OF,
    Webhook,
    delivery_id,
    end_data,
    event,
    event_id,
    queue_partition,
)
from serve_app.ports import WebhookStore

_OPTIONS = orjson.OPT_NON_STR_KEYS  # what a step computed may have them


class Endings:
    """The runtime's `on_end` where there are webhooks.

    Args:
        partition_count: of the store.
        output_bytes_max: a larger output, or metadata, is left out.
        url_of: where an execution's record can be fetched.
    """

    def __init__(
        self,
        webhooks: WebhookStore,
        partition_count: int,
        output_bytes_max: int,
        url_of: Callable[[str], str],
    ) -> None:
        self._webhooks = webhooks
        self._partition_count = partition_count
        self._output_bytes_max = output_bytes_max
        self._url_of = url_of

    async def outgoing(self, execution: Execution) -> Sequence[Outgoing]:
        """One message for each endpoint that hears of this end."""
        created = execution.created
        known = await self._webhooks.known(created.workspace, created.at_ms)
        hearing = [webhook for webhook in known if webhook.hears(execution)]
        if not hearing:
            return ()
        kind, an_event_id = EVENT_OF[execution.status], event_id(execution.id)
        body = self._body(execution, kind, an_event_id)
        return tuple(
            deliver(webhook, an_event_id, kind, body, self._partition_count) for webhook in hearing
        )

    def _body(self, execution: Execution, kind: str, an_event_id: str) -> bytes:
        output: JsonValue = execution.data
        metadata: JsonValue = dict(execution.created.metadata)
        is_cut = self._is_large(output)
        data = end_data(
            execution, None if is_cut else output, None if self._is_large(metadata) else metadata
        )
        if is_cut:
            data["outputUrl"] = self._url_of(execution.id)
        assert execution.completed_at_ms is not None, "an execution that ended has an end"
        whole = event(an_event_id, kind, execution.completed_at_ms, data)
        return orjson.dumps(whole, option=_OPTIONS)

    def _is_large(self, value: JsonValue) -> bool:
        return len(orjson.dumps(value, option=_OPTIONS)) > self._output_bytes_max


def deliver(
    webhook: Webhook, an_event_id: str, kind: str, body: bytes, partition_count: int
) -> Outgoing:
    """The message that makes one delivery."""
    partition = queue_partition(webhook.id, partition_count)
    assert partition is not None, "a stored webhook has an id of this cluster"
    return Outgoing(
        message_id=delivery_id(webhook.id, an_event_id),
        target_partition=partition,
        log=f"webhook:{webhook.id}:{webhook.workspace}:{an_event_id}:{kind}",
        body=body,
    )

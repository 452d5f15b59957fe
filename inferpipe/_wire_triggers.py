"""The JSON of triggers: what started an execution, and the secrets of webhooks that come in."""

from typing import Annotated

from pydantic import Field, StrictInt

from inferpipe._wire_base import RequestModel, Timestamp, WireModel


class TriggerView(WireModel):
    """What started an execution: `api` is a call, `parent` a step of the execution `id`."""

    type: str
    id: str | None = None
    name: str | None = None
    at: Timestamp | None = None


class HookRequest(RequestModel):
    """The secret of a workflow's hook: the sender's own, or none for a new one; overlap in ms."""

    secret: str | None = None
    overlap: Annotated[StrictInt, Field(ge=0)] | None = None


class HookView(WireModel):
    """Where a sender sends, and what it signs with; the secret is shown here and never again."""

    url: str
    secret: str | None = None
    secret_shown: bool | None = None


class HookDelivery(WireModel):
    """A webhook that was taken in, under the id of its event."""

    id: str

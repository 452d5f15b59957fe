"""What every wire model is made of: names, moments, counts.

Owns the mapping of snake_case attributes to camelCase members. Invariant: answers ignore members
they do not know, since a newer server may send more; requests refuse them, since they are typos.
"""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


def _to_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


# RFC 3339 in UTC. Python's own UTC also replaces pydantic-core's time zone object: one that is
# alive when the interpreter ends makes it crash (pydantic issue 12867; seen with 2.14.3).
Timestamp = Annotated[AwareDatetime, AfterValidator(_to_utc)]
Count = Annotated[int, Field(ge=0)]


class WireModel(BaseModel):
    """camelCase on the wire, snake_case in Python; dumps are the wire's by default."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )


class RequestModel(WireModel):
    """A body that a client sends."""

    model_config = ConfigDict(extra="forbid")

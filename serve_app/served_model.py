"""One of several models that a service serves: a member of the setting `models`.

Owns its names and what may differ from one model to the next; what is left out is as the settings
of the same name say. Invariant: each member but the names and the path bears a setting's name.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class ServedModel(BaseModel):
    """A model, where its weights are, and how its engines run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    path: str = ""
    aliases: tuple[str, ...] = ()
    replicas: int = Field(1, ge=1)
    model_runner: Literal["auto", "generate", "pooling"] | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    context_max: int | None = Field(None, ge=0)
    kv_cache_gib: float | None = Field(None, gt=0)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    engine_seqs_max: int | None = Field(None, ge=1)
    engine_threads: int | None = Field(None, ge=0)
    engine_eager: bool | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None

    @field_validator("name", "aliases")
    @classmethod
    def _are_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if "," in name or name != name.strip() or not name:
                raise ValueError(f"{name!r} is no model's name: no comma, no space around it")
        return value

    @model_validator(mode="after")
    def _are_distinct(self) -> Self:
        if len({self.name, *self.aliases}) != 1 + len(self.aliases):
            raise ValueError(f"model {self.name!r} has one name twice")
        return self

    def as_settings(self) -> dict[str, object]:
        """The settings of its own replicas, where they differ from the service's."""
        own = self.model_dump(exclude={"name", "path", "aliases", "replicas"}, exclude_none=True)
        return {
            **own,
            "model": self.path,
            "model_name": ",".join((self.name, *self.aliases)),
            "model_replicas": self.replicas,
        }

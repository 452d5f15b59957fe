"""Workflow definitions as values: steps, blocks of steps, and which steps come next.

Owns what a checked definition holds; `definition.py` makes one from a document. Invariant: step
ids are unique in a workflow, inner ones included, so the last part of a path names its step.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.core.inference import JsonValue
from serve_app.core.retry import RetryPolicy
from serve_app.core.triggers import CancelOn, Trigger

DURATION_MS_MAX = 366 * 86_400_000
COMPOSITES = ("parallel", "map", "branch", "loop")  # types whose settings hold steps
GENERATE = "generate"  # holds steps where it has tools

_DURATION = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(ms|s|m|h|d)", re.ASCII)
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True, slots=True)
class Block:
    """Steps that run as one: a branch, a case, what a map or a loop repeats.

    Args:
        key: the branch's name, the case's number, or `else`; "" where items or rounds are counted.
        steps: one or more, in document order.
        when: CEL, of a case.
    """

    key: str
    steps: tuple["Step", ...]
    when: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One node of a definition.

    Args:
        settings: what stands under the key that names the type, expressions not yet filled in.
        needs: ids of the steps that must be done before.
        when: CEL; the step is skipped where it is false. None: always run.
        retry: of the step itself, inside one attempt of the execution. None: no retry.
        blocks: of a composite, its inner steps; their settings are not repeated in `settings`.
    """

    id: str
    type: str
    settings: JsonValue
    needs: tuple[str, ...] = ()
    when: str | None = None
    retry: RetryPolicy | None = None
    timeout_ms: int | None = None
    blocks: tuple[Block, ...] = ()

    def setting(self, name: str) -> JsonValue:
        """One member of the settings; None where they have no such member."""
        return self.settings.get(name) if isinstance(self.settings, Mapping) else None


@dataclass(frozen=True, slots=True)
class Concurrency:
    """At most `limit` executions at once, for each value of `key` where there is one.

    Args:
        key: CEL over the input; None: all executions of the workflow share the limit.
        is_rejecting: one too many is refused instead of queued.
    """

    limit: int
    key: str | None = None
    is_rejecting: bool = False


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most so many starts, and tokens, in any window, for each value of `key` if there is one.

    Args:
        requests, tokens: one of them or both.
        tokens_expected: what the model steps of one execution may write, at most `tokens`.
    """

    requests: int | None
    window_ms: int
    key: str | None = None
    tokens: int | None = None
    tokens_expected: int = 1


@dataclass(frozen=True, slots=True)
class FlowControl:
    """When an accepted execution may start."""

    concurrency: Concurrency | None = None
    rate_limit: RateLimit | None = None
    cache_ttl_ms: int | None = None


NO_FLOW_CONTROL = FlowControl()


@dataclass(frozen=True, slots=True)
class Workflow:
    """A checked definition.

    Args:
        input_schema: JSON Schema of the input; None takes anything.
        output: expressions not yet filled in; counts only where `has_output`.
        has_output: False: the output is that of the last step.
        steps: those outside of any composite, one or more, in document order.
        document: the definition in plain dicts and lists, as it is stored and shown.
    """

    id: str
    description: str
    input_schema: Mapping[str, JsonValue] | None
    output: JsonValue
    has_output: bool
    timeout_ms: int | None
    retry: RetryPolicy
    steps: tuple[Step, ...]
    document: Mapping[str, JsonValue]
    flow: FlowControl = NO_FLOW_CONTROL
    triggers: tuple[Trigger, ...] = ()
    cancel_on: tuple[CancelOn, ...] = ()

    _by_id: Mapping[str, Step] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_id", {step.id: step for step in every_step(self.steps)})

    @property
    def cancel_names(self) -> tuple[str, ...]:
        """The events that may cancel an execution, each once."""
        return tuple(dict.fromkeys(one.event for one in self.cancel_on))

    def step(self, path: str) -> Step:
        """The step that a runtime id names: its own id, or a path that ends in it.

        Raises:
            KeyError: there is none.
        """
        return self._by_id[path.rpartition("/")[2]]

    def steps_at(self, block: str) -> tuple[Step, ...]:
        """The steps of a block by its path, `each/3`; "" names those outside of any composite.

        Raises:
            KeyError: there is no such block.
        """
        if not block:
            return self.steps
        composite, _, key = block.rpartition("/")
        for one in self.step(composite).blocks:
            if one.key in ("", key):
                return one.steps
        raise KeyError(block)


def every_step(steps: Sequence[Step]) -> Iterator[Step]:
    """All steps, inner ones included, in document order."""
    for step in steps:
        yield step
        for block in step.blocks:
            yield from every_step(block.steps)


def ready_steps(
    steps: Sequence[Step], done: Collection[str], started: Collection[str]
) -> tuple[Step, ...]:
    """The steps of a block not yet started whose needs are all done, in document order."""
    ended = frozenset(done)
    return tuple(step for step in steps if step.id not in started and ended.issuperset(step.needs))


def parse_duration_ms(value: object) -> int:
    """Milliseconds of `"1.5h"`-like text or an integer that already counts them.

    Raises:
        ValueError: it is neither, not positive, or longer than 366 days.
    """
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        duration_ms = round(float(match[1]) * _UNIT_MS[match[2]])
    elif isinstance(value, int) and not isinstance(value, bool):
        duration_ms = value
    else:
        raise ValueError('a duration is text such as "30s" (ms, s, m, h, d) or milliseconds')
    if not 0 < duration_ms <= DURATION_MS_MAX:
        raise ValueError("a duration is longer than nothing and at most 366d")
    return duration_ms

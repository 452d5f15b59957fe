"""When an accepted execution may start: its gates, its rate.

Owns the names of gates and the refusals before acceptance. Their state is the store's. Invariant:
a caller that waits for its answer is refused at once where it would have to stand in line; what is
accepted stands in a bounded line, and its deadline runs meanwhile.
"""

import json
from dataclasses import dataclass, replace

from serve_app.core.errors import InvalidInputError, RateLimitExceededError, StepFailedError
from serve_app.core.execution import ExecutionCreated
from serve_app.core.gates import Gate, Rate, TokenShare, gate_name
from serve_app.core.limits import Standing
from serve_app.core.workflow import FlowControl
from serve_app.ports import Clock, Expressions, FlowStore

RETRY_AFTER_MS = 1_000  # of a refusal that nobody can date: a slot is free when somebody ends


@dataclass(frozen=True, slots=True)
class FlowLimits:
    """How long lines may grow.

    Args:
        waiting_max: executions before one gate.
        ahead_max_ms: how far ahead of a rate an execution may be accepted.
    """

    waiting_max: int
    ahead_max_ms: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """An execution with its gates, and when it may ask the first of them (Unix epoch)."""

    created: ExecutionCreated
    start_at_ms: int = 0


class Flow:
    """The flow control of every workflow."""

    def __init__(
        self, store: FlowStore, expressions: Expressions, clock: Clock, limits: FlowLimits
    ) -> None:
        self._store = store
        self._expressions = expressions
        self._clock = clock
        self._limits = limits

    async def admit(
        self, created: ExecutionCreated, flow: FlowControl, *, may_wait: bool
    ) -> Admitted:
        """Give an execution its gates and its time.

        `may_wait` says that its caller does not wait for the answer.

        Raises:
            RateLimitExceededError: a limit of the workflow is reached.
            InvalidInputError: a key's expression has no value for this input.
        """
        cache, slot = self._cache(created, flow), self._slot(created, flow, may_wait=may_wait)
        gates = tuple(gate for gate in (cache, slot) if gate is not None)
        is_shared = False
        if cache is not None:
            places = await self._store.places(cache)
            # Another one has the result or is making it: no work of its own is to be expected.
            is_shared = places.has_result or places.inside_count > 0
        start_at_ms, share = 0, None
        if not is_shared:
            if slot is not None:
                await self._check_slot(slot)
            start_at_ms, share = await self._take_rates(created, flow, may_wait=may_wait)
        return Admitted(replace(created, gates=gates, tokens=share), start_at_ms)

    async def _check_slot(self, slot: Gate) -> None:
        places = await self._store.places(slot)
        is_full = places.inside_count >= slot.limit
        if is_full and places.waiting_count >= slot.waiting_max:
            standing = Standing(
                is_allowed=False,
                kind="requests",
                count_max=slot.limit,
                remaining=0,
                reset_ms=RETRY_AFTER_MS,
            )
            raise RateLimitExceededError(
                f"{slot.limit} executions of this workflow run already", standing
            )

    async def _take_rates(
        self, created: ExecutionCreated, flow: FlowControl, *, may_wait: bool
    ) -> tuple[int, TokenShare | None]:
        """Take from the rates there are, or from none; when it may start (Unix epoch, 0: now)."""
        limit = flow.rate_limit
        if limit is None:
            return 0, None
        key = self._key(limit.key, created, "rateLimit")
        place = (created.workspace, created.workflow_id)
        ahead_max_ms = self._limits.ahead_max_ms if may_wait else 0
        wait_ms = tokens_ms = 0
        spending: Rate | None = None
        if limit.tokens is not None:
            spending = Rate(gate_name(*place, "tokens", key), limit.tokens, limit.window_ms)
            tokens_ms = await self._store.take_rate(spending, limit.tokens_expected, ahead_max_ms)
            if tokens_ms < 0:
                raise _too_fast("spends", spending, "tokens", -tokens_ms)
        if limit.requests is not None:
            starts = Rate(gate_name(*place, "rate", key), limit.requests, limit.window_ms)
            wait_ms = await self._store.take_rate(starts, 1, ahead_max_ms)
            if wait_ms < 0:
                if spending is not None:
                    await self._store.take_rate(spending, -limit.tokens_expected, 0)
                raise _too_fast("starts", starts, "requests", -wait_ms)
        wait_ms = max(wait_ms, tokens_ms)
        now_ms = self._clock.now_ms()
        share = None
        if spending is not None:
            share = TokenShare(
                spending.name,
                spending.count_max,
                spending.window_ms,
                limit.tokens_expected,
                now_ms + wait_ms,
            )
        return (now_ms + wait_ms if wait_ms else 0), share

    def _cache(self, created: ExecutionCreated, flow: FlowControl) -> Gate | None:
        if flow.cache_ttl_ms is None:
            return None
        version = str(created.workflow_version)
        given = json.dumps(created.input, sort_keys=True, separators=(",", ":"))
        name = gate_name(created.workspace, created.workflow_id, "cache", version, given)
        return Gate(name, 1, self._limits.waiting_max, flow.cache_ttl_ms)

    def _slot(self, created: ExecutionCreated, flow: FlowControl, *, may_wait: bool) -> Gate | None:
        if flow.concurrency is None:
            return None
        key = self._key(flow.concurrency.key, created, "concurrency")
        name = gate_name(created.workspace, created.workflow_id, "slot", key)
        # Looking and entering are two calls: who came between them is refused by the gate itself.
        has_line = may_wait and not flow.concurrency.is_rejecting
        waiting_max = self._limits.waiting_max if has_line else 0
        return Gate(name, flow.concurrency.limit, waiting_max)

    def _key(self, expression: str | None, created: ExecutionCreated, setting: str) -> str:
        if expression is None:
            return ""
        scope = {
            "input": created.input,
            "event": {} if created.trigger is None else created.trigger.shown(created.input),
            "execution": {
                "workflowId": created.workflow_id,
                "workspaceId": created.workspace,
                "userId": created.user_id,
                "metadata": created.metadata,
            },
        }
        try:
            value = self._expressions.evaluate(expression, scope)
        except StepFailedError as error:
            raise InvalidInputError(f"the workflow's {setting}.key: {error}") from error
        return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _too_fast(does: str, rate: Rate, kind: str, reset_ms: int) -> RateLimitExceededError:
    standing = Standing(
        is_allowed=False, kind=kind, count_max=rate.count_max, remaining=0, reset_ms=reset_ms
    )
    unit = "tokens" if kind == "tokens" else "times"
    return RateLimitExceededError(
        f"this workflow {does} {rate.count_max} {unit} in {rate.window_ms} ms", standing
    )

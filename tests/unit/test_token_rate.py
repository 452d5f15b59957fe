"""A rate of tokens: its form, what an execution is expected to write, what it has spent."""

import json
from typing import Any

import pytest

from serve_app.core.errors import InvalidWorkflowError
from serve_app.core.execution import (
    CancelRequested,
    ExecutionCancelled,
    ExecutionStarted,
    StepCompleted,
    StepFailed,
    StepRetrying,
    StepStarted,
)
from serve_app.core.gate_messages import spent
from serve_app.core.gates import TokenShare
from serve_app.core.template import Loc
from serve_app.core.workflow import RateLimit
from tests.support.definitions import parsed
from tests.support.workflows import T0, USAGE, an_execution

SHARE = TokenShare("0" * 32, tokens=1000, window_ms=1000, reserved=100, at_ms=T0)


def rate(steps: str, **limit: Any) -> RateLimit | None:
    return parsed(steps, rateLimit={"window": "60s", **limit}).flow.rate_limit


ASK = '[{id: a, generate: {prompt: "x", max_tokens: 300}}]'
TWICE = """
- {id: a, generate: {prompt: "x"}}
- {id: b, map: {over: [1], steps: [{id: c, generate: {prompt: "y", max_tokens: "{{ item }}"}}]}}
"""
TOOLS = """
- id: a
  generate:
    prompt: x
    max_tokens: 30
    tools: [{name: t, description: d, step: {generate: {prompt: y, max_tokens: 5}}}]
"""


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(ASK, 300), (TWICE, 1000), (TOOLS, 35), ("[{id: e, echo: {}}]", 1)],
)
def test_each_model_step_is_expected_once_and_the_limit_at_most(steps: str, expected: int) -> None:
    found = rate(steps, tokens=1000)
    assert found == RateLimit(None, 60_000, None, 1000, expected)


def test_both_may_stand_together_and_one_must() -> None:
    assert rate(ASK, tokens=1000, requests=3) == RateLimit(3, 60_000, None, 1000, 300)
    assert rate(ASK, requests=3) == RateLimit(3, 60_000)


@pytest.mark.parametrize(
    ("limit", "loc"),
    [
        ({}, ("requests",)),
        ({"tokens": 0}, ("tokens",)),
        ({"tokens": True}, ("tokens",)),
        ({"tokens": 10**12 + 1}, ("tokens",)),
        ({"tokens": 10, "requests": 0}, ("requests",)),
        ({"tokens": 10, "token": 1}, ("token",)),
    ],
)
def test_a_mistake_is_refused(limit: dict[str, Any], loc: Loc) -> None:
    with pytest.raises(InvalidWorkflowError) as refused:
        rate(ASK, **limit)
    assert ("rateLimit", *loc) in [problem.loc for problem in refused.value.problems]


@pytest.mark.parametrize(
    ("passed_ms", "left"), [(-5, 100), (0, 100), (1, 100), (500, 50), (999, 0), (5000, 0)]
)
def test_what_was_reserved_is_refilled_with_time(passed_ms: int, left: int) -> None:
    assert SHARE.left_at(T0 + passed_ms) == left


def used(message: Any) -> int:
    assert message.target_partition == 0
    members = json.loads(message.body)
    assert {key: members[key] for key in ("rate", "tokens", "window_ms")} == {
        "rate": SHARE.name,
        "tokens": 1000,
        "window_ms": 1000,
    }
    return int(members["used"])


def test_every_attempt_is_counted_and_the_rest_given_back_at_the_end() -> None:
    begun = (ExecutionStarted(T0), StepStarted(T0, "s", 1))
    retried = StepRetrying(T0 + 1, "s", 2, 1, T0 + 2, "broke", USAGE)
    again = StepStarted(T0 + 2, "s", 2)
    failed = StepFailed(T0 + 250, "s", "aborted", "CANCELLED", USAGE)
    ended = (
        CancelRequested(T0 + 250, "enough"),
        failed,
        ExecutionCancelled(T0 + 250, "enough"),
    )
    first = an_execution(*begun, retried, tokens=SHARE)
    (message,) = spent(first, (retried,), 4)
    assert used(message) == USAGE.total_tokens
    last = an_execution(*begun, retried, again, *ended, tokens=SHARE)
    (other,) = spent(last, ended, 4)
    assert used(other) == USAGE.total_tokens - 75
    assert message.message_id != other.message_id


def test_nothing_is_said_without_a_rate_or_a_cost() -> None:
    done = StepCompleted(T0, "s", 1, USAGE)
    begun = (ExecutionStarted(T0), StepStarted(T0, "s", 1))
    assert spent(an_execution(*begun, done), (done,), 4) == ()
    assert spent(an_execution(*begun, tokens=SHARE), begun, 4) == ()

from collections.abc import Mapping
from types import MappingProxyType

import pytest

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.core.errors import StepFailedError
from serve_app.core.template import EXPRESSION_CHARS_MAX

SCOPE: dict[str, Mapping[str, object]] = {
    "input": MappingProxyType(
        {
            "n": 3,
            "text": "hi",
            "none": None,
            "list": (1, 2, {"a": "b"}),
            "messages": [{"role": "user", "content": "x", "id": 7}],
            "long": "a" * 10_000,
            "many": list(range(9_000)),
            "huge": 2**70,
        }
    ),
    "steps": {"a": {"output": {"label": "bug"}}},
    "execution": {"id": "e1"},
}


@pytest.fixture(scope="module")
def expressions() -> CelExpressions:
    return CelExpressions()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("input.n", 3),
        ("input['text']", "hi"),
        ("input.list[2].a", "b"),
        ("input.none", None),
        ("input.n + 1", 4),
        ("input.n == 3.0", True),
        ("steps.a.output.label == 'bug'", True),
        ("has(input.temperature) ? input.temperature : 0.7", 0.7),
        ("has(steps.b) ? 1 : 2", 2),
        ("size(input.list)", 3),
        ("input.list[2].a + '!'", "b!"),
        (
            'input.messages.map(m, {"role": m.role, "content": m.content})',
            [{"role": "user", "content": "x"}],
        ),
        ("input.messages.filter(m, m.role == 'system')", []),
        ("{'a': {'b': [1u, null, true]}}", {"a": {"b": [1, None, True]}}),
        ("timestamp('2026-01-02T03:04:05Z')", "2026-01-02T03:04:05Z"),
        ("[duration('90s'), duration('1.5s'), duration('0s')]", ["90s", "1.5s", "0s"]),
        ("'ü😀' + '\\u00e9'", "ü😀é"),
        ("[1, 2].map(input, input + 1)", [2, 3]),
    ],
)
def test_values_are_plain_json(expressions: CelExpressions, text: str, value: object) -> None:
    found = expressions.evaluate(text, SCOPE)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("input.missing", "no 'missing'"),
        ("input.missing + 1", 'no key "missing"'),
        ("event.x", "no event here"),
        ("item + 1", "item"),
        ("input.list[9]", "no 9"),
        ("input.n.x", "no 'x'"),
        ("input.n + 1.5", "No matching overloads"),
        ("1 / (input.n - 3)", "divide by zero"),
        ("9223372036854775807 + input.n", "overflow"),
        ("input.huge + 1", "64-bit"),
        ("b'x'", "bytes"),
        ("type(1)", "JSON does not have"),
        ("0.0 / 0.0", "nan"),
        ("[1.0 / 0.0]", "inf"),
        ("{1: 2}", "no text"),
        ("1 +", "Syntax error"),
    ],
)
def test_failures_name_the_expression_and_are_final(
    expressions: CelExpressions, text: str, reason: str
) -> None:
    with pytest.raises(StepFailedError, match=reason.replace("(", r"\(")) as caught:
        expressions.evaluate(text, SCOPE)
    assert f"`{text}`" in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "text",
    [
        "input.many.map(a, a)",
        "input.many.all(a, input.many.all(b, a + b >= 0))",
        "[input.long]" + ".map(s, s+s+s+s+s+s+s+s+s+s)" * 6,
        "[dyn(1)]" + ".map(s, [s,s,s,s,s,s,s,s,s,s])" * 9 + " == input.list",
        "input.many.map(a, input.long + 'x')",
        "input.many.all(a, 'aaa'.matches('((a{1,30}){1,30})b'))",
    ],
)
def test_costly_expressions_are_refused(expressions: CelExpressions, text: str) -> None:
    with pytest.raises(StepFailedError, match=r"costly|budget"):
        expressions.evaluate(text, SCOPE)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("input.many.all(a, a >= 0)", True),
        ("input.thousand.map(a, a + 1).size()", 1_000),
        ("input.thousand.exists(a, a in input.list)", True),
        ("input.fifty.map(a, input.fifty.filter(b, b < a).size())[49]", 49),
        ("size(input.long + input.long)", 20_000),
    ],
)
def test_what_workflows_need_is_not_too_costly(
    expressions: CelExpressions, text: str, value: object
) -> None:
    more = {"thousand": list(range(1_000)), "fifty": list(range(50))}
    scope = {"input": {**SCOPE["input"], **more}}
    assert expressions.evaluate(text, scope) == value


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_length_of_an_expression_is_bounded(expressions: CelExpressions, extra: int) -> None:
    text = "'" + "x" * (EXPRESSION_CHARS_MAX + extra - 2) + "'"
    assert (expressions.check(text) is None) == (extra <= 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("inptu.x", "undeclared reference to 'inptu.x'"),
        ("1 + ", "Syntax error"),
        ("", "Syntax error"),
        ("f(1)", "undeclared reference to 'f'"),
        ("(" * 100 + "1" + ")" * 100, "recursion"),
        ("1" + "+1" * 1_000, "recursion"),
        ("'\ud800'", ""),
        ("\x00", ""),
    ],
)
def test_what_is_no_expression_is_said_in_one_line(
    expressions: CelExpressions, text: str, reason: str
) -> None:
    problem = expressions.check(text)
    assert problem is not None
    assert reason in problem
    assert "\n" not in problem


def test_a_path_gives_the_scopes_own_value(expressions: CelExpressions) -> None:
    big = {"a": ["x" * 1_000]}
    assert expressions.evaluate("input.big", {"input": {"big": big}}) is big


def test_only_what_is_mentioned_is_converted(expressions: CelExpressions) -> None:
    scope = {"input": {"n": 1, "unfit": object(), "deep": {"n": 2, "unfit": object()}}}
    assert expressions.evaluate("input.n + input.deep.n", scope) == 3
    with pytest.raises(StepFailedError, match="object"):
        expressions.evaluate("input.deep == {}", scope)

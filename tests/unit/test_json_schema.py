import json

import pytest

from serve_app.adapters.json_schema import (
    APPLICATIONS_MAX,
    PROBLEMS_MAX,
    SCHEMA_CHARS_MAX,
    JsonSchemas,
)
from serve_app.core.errors import Problem

ORDER = {
    "type": "object",
    "required": ["id", "lines"],
    "additionalProperties": False,
    "properties": {
        "id": {"type": "string", "pattern": "^[a-z]+$"},
        "lines": {"type": "array", "items": {"type": "object", "required": ["price"]}},
        "kind": {"enum": ["new", "old"]},
    },
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.fixture
def schemas() -> JsonSchemas:
    return JsonSchemas()


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"left": value}
    return value


def doubling(levels: int) -> dict[str, object]:
    twice = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(levels)}
    return {"$defs": {**twice, f"a{levels}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def test_a_value_that_fits_has_no_problem(schemas: JsonSchemas) -> None:
    assert schemas.problems(ORDER, {"id": "abc", "lines": ({"price": 1},), "kind": "new"}) == ()


def test_all_problems_come_sorted_by_place(schemas: JsonSchemas) -> None:
    value = {"kind": "x", "lines": [{"price": 1}, {}, 3], "what": 1}
    assert schemas.problems(ORDER, value) == (
        Problem(("id",), "is required: add it"),
        Problem(("kind",), 'must be one of "new", "old"'),
        Problem(("lines", 1, "price"), "is required: add it"),
        Problem(("lines", 2), "must be of type object"),
        Problem(("what",), "is not known here: remove it"),
    )


def test_problems_are_bounded_and_the_first_ones_kept(schemas: JsonSchemas) -> None:
    problems = schemas.problems({"items": {"type": "string"}}, list(range(100)))
    assert [problem.loc for problem in problems] == [(index,) for index in range(PROBLEMS_MAX)]


def test_messages_do_not_repeat_the_value(schemas: JsonSchemas) -> None:
    (problem,) = schemas.problems({"pattern": "^b$"}, "a" * 100_000)
    assert problem.msg == 'the value does not match "^b$"'


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objct"}, "at type"),
        ({"properties": 3}, "at properties"),
        ({"pattern": "(?=a)"}, "look-around"),
        ({"pattern": "(a{1,1000}){1,1000}"}, "regex"),
        ({"$ref": "http://127.0.0.1:9/x.json"}, "not followed"),
        ({"$ref": "file:///etc/passwd"}, "not followed"),
        ({"items": {"$ref": "other.json#/a"}}, "not followed"),
        ({"$dynamicRef": "http://127.0.0.1:9/x.json"}, "not followed"),
        ({"items": {"$id": "http://127.0.0.1:9/", "$ref": "x"}}, "$id"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        (doubling(30), str(APPLICATIONS_MAX)),
        ([], "object"),
        (None, "object"),
        ({"const": object()}, "no JSON"),
        ({"maximum": float("nan")}, "no JSON"),
    ],
)
def test_unusable_schemas_are_refused(schemas: JsonSchemas, schema: object, reason: str) -> None:
    problem = schemas.check(schema)
    assert problem is not None
    assert reason in problem
    assert len(schemas.problems(schema, 1)) == 1


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        ORDER,
        TREE,
        doubling(8),
        {"$schema": "http://127.0.0.1:9/meta", "type": "object"},
        {"enum": [{"$ref": "http://127.0.0.1:9/x.json"}]},
        {"properties": {"$ref": {"type": "string"}}},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
    ],
)
def test_usable_schemas_need_no_network(schemas: JsonSchemas, schema: object) -> None:
    # tests/unit bars sockets.
    assert schemas.check(schema) is None


def test_references_in_definitions_that_nobody_uses_are_not_fetched(schemas: JsonSchemas) -> None:
    schemas.check({"$defs": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}})


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_size_of_a_schema_is_bounded(schemas: JsonSchemas, extra: int) -> None:
    empty = len(json.dumps({"description": ""}))
    schema = {"description": "x" * (SCHEMA_CHARS_MAX - empty + extra)}
    assert (schemas.check(schema) is None) == (extra <= 0)


@pytest.mark.parametrize(("depth", "is_accepted"), [(12, True), (40, False)])
def test_a_schema_that_refers_to_itself_bounds_the_depth(
    schemas: JsonSchemas, depth: int, is_accepted: bool
) -> None:
    assert (schemas.problems(TREE, nested(depth)) == ()) == is_accepted


def test_nesting_is_bounded_and_patterns_are_linear(schemas: JsonSchemas) -> None:
    deep: dict[str, object] = {"type": "string"}
    for _ in range(200):
        deep = {"items": deep}
    assert "deeper" in (schemas.check(deep) or "")
    assert len(schemas.problems({"pattern": "^(a+)+$"}, "a" * 50_000 + "b")) == 1


def test_a_value_that_is_no_text_is_a_problem(schemas: JsonSchemas) -> None:
    (problem,) = schemas.problems({"type": "string"}, "\ud800")
    assert "no JSON" in problem.msg

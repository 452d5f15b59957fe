import pytest

from serve_app.core import template
from serve_app.core.errors import StepFailedError
from serve_app.core.template import (
    EXPRESSION_CHARS_MAX,
    TEMPLATE_CHARS_MAX,
    Piece,
    TemplateError,
    expressions_in,
    outline,
    render,
    split,
)

VALUES: dict[str, object] = {
    "text": "hi",
    "number": 1.5,
    "yes": True,
    "nothing": None,
    "list": [1, {"a": "ü"}],
    "map": {"a": {"b": 1}},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_lone_expression_keeps_its_type(name: str) -> None:
    assert render(f"{{{{ {name} }}}}", VALUES.__getitem__) == VALUES[name]


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("no braces", "no braces"),
        ("", ""),
        ("say {{ text }}!", "say hi!"),
        ("{{text}}{{text}}", "hihi"),
        (" {{ number }}", " 1.5"),
        ("{{ yes }}\n", "true\n"),
        ("a{{ nothing }}b", "ab"),
        ("l={{ list }}", 'l=[1,{"a":"ü"}]'),
        ("m={{ map }}", 'm={"a":{"b":1}}'),
        ("}} stays { so { does {this}", "}} stays { so { does {this}"),
    ],
)
def test_text_around_expressions_is_put_together(text: str, rendered: str) -> None:
    assert render(text, VALUES.__getitem__) == rendered


def test_values_are_walked_and_keys_left_alone() -> None:
    value = {"{{ text }}": ["{{ number }}", {"x": "{{ text }}-"}, 3, None]}
    assert render(value, VALUES.__getitem__) == {"{{ text }}": [1.5, {"x": "hi-"}, 3, None]}


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ('{{ {"a": {"b": 1}} }}', '{"a": {"b": 1}}'),
        ('{{ {"a":{"b":1}}}}', '{"a":{"b":1}}'),
        ('{{ "}}" }}', '"}}"'),
        ("{{ '}}' + \"}\" }}", "'}}' + \"}\""),
        (r'{{ "\"}}" }}', r'"\"}}"'),
        (r"{{ r'\' + x }}", r"r'\' + x"),
        ('{{ """a"b}}\n""" }}', '"""a"b}}\n"""'),
        ("{{ r'''\\''' }}", "r'''\\'''"),
        ("{{ b'}}' }}", "b'}}'"),
        ("{{ input.x // why }}", "input.x // why"),
    ],
)
def test_braces_in_literals_and_maps_do_not_end_an_expression(text: str, expression: str) -> None:
    assert split(text) == (Piece(expression, is_expression=True),)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{{ x", "line 1, column 1"),
        ("a\nbc {{ x }", "line 2, column 4"),
        ('{{ {"a": 1} ', "line 1, column 1"),
        ("{{ 'it }}", "line 1, column 4"),
        ("{{}}", "line 1, column 1"),
        ("x {{ \n }}", "line 1, column 3"),
    ],
)
def test_what_does_not_pair_up_is_refused_with_its_place(text: str, place: str) -> None:
    with pytest.raises(TemplateError, match=place):
        split(text)


@pytest.mark.parametrize(("extra", "is_accepted"), [(-1, True), (0, True), (1, False)])
def test_the_length_of_an_expression_is_bounded(extra: int, is_accepted: bool) -> None:
    text = "{{" + "x" * (EXPRESSION_CHARS_MAX + extra) + "}}"
    if is_accepted:
        assert split(text)
    else:
        with pytest.raises(TemplateError, match="more than"):
            split(text)


@pytest.mark.parametrize(("extra", "is_accepted"), [(-1, True), (0, True), (1, False)])
def test_the_length_of_a_text_is_bounded(extra: int, is_accepted: bool) -> None:
    text = "x" * (TEMPLATE_CHARS_MAX + extra)
    if is_accepted:
        assert split(text)
    else:
        with pytest.raises(TemplateError, match="more than"):
            split(text)


@pytest.mark.parametrize("value", [["{{ x }}"] * 5, "{{ x }}{{ x }}{{ x }}{{ x }}{{ x }}"])
def test_the_size_of_a_rendering_is_bounded(
    value: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "RENDERED_CHARS_MAX", 40)
    assert render(value, lambda _: "x" * 8)
    with pytest.raises(StepFailedError) as caught:
        render(value, lambda _: "x" * 9)
    assert not caught.value.retryable


def test_a_value_that_is_no_json_is_refused() -> None:
    with pytest.raises(StepFailedError, match="bytes"):
        render("{{ x }}", lambda _: b"raw")


def test_expressions_are_listed_with_their_places() -> None:
    value = {"a": ["x", "{{ one }} and {{ two }}"], "b": {"c": "{{ three }}"}, "d": 1}
    assert expressions_in(value) == [
        (("a", 1), "one"),
        (("a", 1), "two"),
        (("b", "c"), "three"),
    ]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("steps.a.output", [("steps", "a", "output")]),
        ("steps [ 'a-b' ] . output", [("steps", "a-b", "output")]),
        ("has(steps.a.output) ? 1 : 2", [("steps", "a", "output")]),
        ("'steps.a' + r\"steps.b\"", []),
        ("x.steps.a", [("x", "steps", "a")]),
        ("f(y).steps.a", [("y",)]),
        (".steps.a", [("steps", "a")]),
        ("1 in .steps.a", [("steps", "a")]),
        ("steps[input.x]", [("steps",), ("input", "x")]),
        (r"steps['\x61']", [("steps",)]),
        ("steps.a.output.size()", [("steps", "a", "output")]),
        ("input.l[0].x", [("input", "l", 0, "x")]),
        ("[1].map(steps, steps.a)", []),
        ("input.l.map(m, m.x + steps.a)", [("input", "l"), ("steps", "a")]),
        ("1 // steps.a", []),
        ("true && null == steps.a", [("steps", "a")]),
    ],
)
def test_free_names_are_found_in_code_only(text: str, paths: list[tuple[str | int, ...]]) -> None:
    assert [reference.path for reference in outline(text).references] == paths


def test_macros_are_counted() -> None:
    found = outline("input.l.map(a, a + a).filter(b, input.l.exists(c, c == b))")
    assert found.macro_uses == (2, 1, 1)
    assert found.macro_depth == 2
    assert [reference.macro_depth for reference in found.references] == [0, 1]


@pytest.mark.parametrize(
    ("text", "is_path"),
    [("input.a['b'][0]", True), ("input", True), ("input.a + 1", False), ("(input.a)", False)],
)
def test_plain_paths_are_told_apart(text: str, is_path: bool) -> None:
    assert outline(text).is_path == is_path

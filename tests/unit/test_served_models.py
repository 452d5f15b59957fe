"""Several models in the settings: what each one's replicas are told, and the names they go by."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.served_model import ServedModel
from serve_app.settings import Settings, read_settings

TWO = [
    {"name": "small", "path": "/models/small", "aliases": ["gpt-small"], "replicas": 2},
    {"name": "org/large", "path": "/models/large", "dtype": "float32", "engine_seqs_max": 8},
]


def test_one_model_is_as_the_short_settings_say() -> None:
    one = Settings(model="/m", model_name="m, n", model_replicas=3)
    assert one.of_each_model() == (one,)
    assert one.own_names == {"m": "m", "n": "m"}
    assert Settings(model_replicas=0).of_each_model() == ()


def test_each_model_has_its_own_settings_and_shares_the_rest() -> None:
    settings = Settings(models=TWO, engine_seqs_max=32, region="north", model="/ignored")
    small, large = settings.of_each_model()
    assert (small.model, small.model_names, small.model_replicas) == (
        "/models/small",
        ("small", "gpt-small"),
        2,
    )
    assert (large.model_names, large.model_replicas) == (("org/large",), 1)
    assert (small.dtype, large.dtype) == ("auto", "float32")
    assert (small.engine_seqs_max, large.engine_seqs_max) == (32, 8)
    assert small.region == large.region == "north"
    assert small.models == large.models == ()
    assert settings.own_names == {"small": "small", "gpt-small": "small", "org/large": "org/large"}


def test_what_a_model_may_set_bears_the_names_of_settings() -> None:
    own = set(ServedModel.model_fields) - {"name", "path", "aliases", "replicas"}
    assert own <= set(Settings.model_fields)
    for name in own:
        assert f"`{name}`" in (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_the_list_is_read_from_the_environment_and_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERPIPE_MODELS", json.dumps(TWO))
    assert [one.name for one in read_settings().models] == ["small", "org/large"]
    monkeypatch.delenv("INFERPIPE_MODELS")
    path = tmp_path / "inferpipe.yaml"
    path.write_text("models:\n  - {name: a, path: /a}\n  - {name: b, path: /b, aliases: [c]}\n")
    monkeypatch.setenv("INFERPIPE_CONFIG", str(path))
    assert read_settings().own_names == {"a": "a", "b": "b", "c": "b"}


@pytest.mark.parametrize(
    "models",
    [
        [{"path": "/m"}],
        [{"name": ""}],
        [{"name": "a,b"}],
        [{"name": " a"}],
        [{"name": "a", "replicas": 0}],
        [{"name": "a", "port": 1}],
        [{"name": "a", "aliases": ["a"]}],
        [{"name": "a", "aliases": [""]}],
        [{"name": "a"}, {"name": "b", "aliases": ["a"]}],
        "a",
    ],
)
def test_a_wrong_list_is_refused(models: object) -> None:
    with pytest.raises(ValidationError):
        Settings(models=models)

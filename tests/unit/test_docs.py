"""The pages made from the code are fresh, and name all that there is."""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest
from pydantic import Field

from serve_app.core.errors import ErrorCode
from serve_app.core.execution import KINDS, Status
from serve_app.settings import Settings

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "docs"))


@pytest.mark.parametrize("page", SCRIPT["PAGES"])
def test_a_page_is_what_the_code_says(page: str) -> None:
    made: Callable[[], str] = SCRIPT["PAGES"][page]
    assert (ROOT / page).read_text() == made(), f"{page} is stale: run `make docs`"


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        assert f"| `INFERPIPE_{name.upper()}` |" in page
        assert field.description, f"{name} needs a description"


def test_every_status_and_event_is_in_the_diagram() -> None:
    page = (ROOT / "docs" / "states.md").read_text()
    assert [status for status in Status if f" {status}" not in page] == []
    assert [kind for kind in KINDS if kind not in page] == []


def test_every_error_code_is_documented() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    assert [code for code in ErrorCode if f"| `{code}` |" not in page] == []


def test_a_stale_page_is_found_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = SCRIPT["main"]
    main.__globals__.update(ROOT=tmp_path, PAGES=MappingProxyType({"page.md": lambda: "new\n"}))
    assert main(["--check"]) == 1
    assert not (tmp_path / "page.md").exists()
    assert main([]) == 0
    assert (tmp_path / "page.md").read_text() == "new\n"
    assert main(["--check"]) == 0
    assert main(["--other"]) == 2
    assert "page.md is stale" in capsys.readouterr().out


def test_a_row_shows_default_bounds_and_meaning() -> None:
    field = Field(Path.home() / "data", ge=1, lt=9, description="Either | or.")
    field.annotation = Path
    assert SCRIPT["settings_row"]("place", field) == (
        "| `INFERPIPE_PLACE` | `~/data` | path at least 1, below 9 | Either \\| or. |"
    )

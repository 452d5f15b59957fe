"""Promises about the tree itself, which no reviewer can hold in the head."""

import ast
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("inferpipe", "serve_app", "deployments")
FOLDERS = (*OURS, "workflows", "tests", "loadtests", "scripts", "kuberay", "docs", ".ci")
LINES_MAX = 400
EXCUSE = f"Longer than {LINES_MAX} lines because"
EXCUSE_WITHIN_LINES = 5  # of the module docstring
# Spelled in parts, so that this file does not find itself.
MACHINE_PATH = re.compile("/(?:" + "|".join(["work", "root", "farm"]) + r")/[a-z.]")


def files_under(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in files_under(*OURS) if p.suffix == ".py"], ids=named)
def test_source_file_is_short_or_says_why_not(path: Path) -> None:
    text = path.read_text()
    length = len(text.splitlines())
    if length > LINES_MAX:
        docstring = ast.get_docstring(ast.parse(text)) or ""
        opening = " ".join(docstring.splitlines()[:EXCUSE_WITHIN_LINES])
        assert EXCUSE in opening, f"{length} lines; split it, or open with '{EXCUSE} ...'"


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    # In a linked work tree `.git` is a file that names the main one.
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    hits = []
    for path in (*files_under(*FOLDERS), *top):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        hits += [f"{named(path)}: {hit.group()}" for hit in MACHINE_PATH.finditer(text)]
    assert hits == []


def test_shipped_workflows_can_be_read_as_package_data() -> None:
    shipped = {item.name for item in resources.files("workflows").iterdir()}
    in_tree = {path.name for path in (ROOT / "workflows").glob("*.yaml")}
    assert in_tree
    assert in_tree <= shipped


def test_serve_app_init_is_empty() -> None:
    assert (ROOT / "serve_app" / "__init__.py").read_text() == ""


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_importing_all_of_core_loads_only_the_standard_library() -> None:
    modules = [path.stem for path in (ROOT / "serve_app" / "core").glob("[a-z]*.py")]
    loaded = modules_loaded_by(f"from serve_app.core import {', '.join(modules)}")
    assert loaded.isdisjoint({"ray", "redis", "pydantic", "vllm", "fastapi", "starlette", "httpx"})


def test_importing_the_public_package_loads_nothing_of_the_server() -> None:
    loaded = modules_loaded_by("import inferpipe.client, inferpipe.wire")
    assert loaded.isdisjoint({"serve_app", "deployments", "ray", "redis", "vllm", "fastapi"})

"""What every test gets: its marker, by the folder it stands in, and Hypothesis's manners."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
MARKERS = {
    "unit": "unit",
    "property": "unit",
    "contract": "unit",
    "surface": "unit",
    "integration": "integration",
    "e2e": "e2e",
    "chaos": "chaos",
}

# No deadline: a busy machine is no defect of the code. CI replays the same examples, so that a red
# run is red again; a person's runs explore.
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in MARKERS:
            raise pytest.UsageError(f"{item.path}: no marker for tests/{folder}; see {__file__}")
        item.add_marker(MARKERS[folder])

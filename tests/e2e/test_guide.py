"""The guide's examples, taken from the page and run against the running service."""

import gc
import re
from pathlib import Path

import pytest

from tests.e2e.conftest import API_KEY, Service
from tests.support.guide import Example, examples_of, run

PAGE = Path(__file__).parents[2] / "docs" / "guide.md"


SHIPPED = PAGE.parents[1] / "workflows"
ALL = "content-moderation|marketing-copy-generator|document-analysis"


def named_workflows(example: Example) -> set[str]:
    """The workflows of the user's guide that an example executes."""
    return set(re.findall(rf'execute(?:_async)?\(\s*"({ALL})"', example.blocks[0].code))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # scripts leave clients to the interpreter
@pytest.mark.parametrize("example", examples_of(PAGE), ids=lambda example: example.name)
def test_example_of_the_guide(
    service: Service, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STAGING_BASE_URL", "STAGING_TIMEOUT_S", "STAGING_RETRIES", "TEST_BASE_URL",
                 "TEST_API_KEY", "WORKSPACE_ID", "ENVIRONMENT"):  # fmt: skip
        monkeypatch.setenv(f"INFERPIPE_{name}", "")  # restored when an example sets it
        monkeypatch.delenv(f"INFERPIPE_{name}")
    monkeypatch.setenv("WEBHOOK_SECRET", "set by the example")
    monkeypatch.setenv("INFERPIPE_API_KEY", API_KEY)
    monkeypatch.setenv("INFERPIPE_BASE_URL", service.url)
    missing = [name for name in named_workflows(example) if not (SHIPPED / f"{name}.yaml").exists()]
    if missing:
        pytest.skip(f"this checkout does not ship {', '.join(missing)}")
    run(PAGE, example)
    gc.collect()  # what it left is closed here, not in another test

"""The examples of docs/flow-control.md are definitions, and say what the page says."""

import re
from pathlib import Path

import yaml

from serve_app.core.workflow import NO_FLOW_CONTROL, Concurrency, FlowControl, RateLimit
from tests.support.definitions import parsed

PAGE = (Path(__file__).parents[2] / "docs" / "flow-control.md").read_text()
EXPECTED = {
    "reports": FlowControl(Concurrency(2, "input.userId")),
    "nightly-digest": FlowControl(Concurrency(1, is_rejecting=True)),
    "lookups": FlowControl(rate_limit=RateLimit(2, 60_000, "input.customer")),
    "summaries": FlowControl(rate_limit=RateLimit(None, 60_000, None, 2000, 500)),
    "tickets": FlowControl(Concurrency(1)),
    "imports": NO_FLOW_CONTROL,
    "definitions": FlowControl(cache_ttl_ms=300_000),
}


def test_the_examples_of_the_page_are_definitions() -> None:
    documents = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    found = {}
    for document in documents:
        steps = yaml.dump(document.pop("steps"))
        found[document.pop("id")] = parsed(steps, **document).flow
    assert found == EXPECTED

"""The example of docs/flow-control.md is a definition, and says what the page says."""

from pathlib import Path

import yaml

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.core.definition import parse_workflow
from serve_app.core.workflow import Concurrency, FlowControl, RateLimit
from serve_app.steps.transform import TRANSFORM

PAGE = Path(__file__).parents[2] / "docs" / "flow-control.md"


def test_the_example_of_the_page_is_a_definition() -> None:
    example = PAGE.read_text().split("```yaml\n")[1].split("```")[0]
    workflow = parse_workflow(
        yaml.safe_load(example),
        check_expression=CelExpressions().check,
        check_schema=JsonSchemas().check,
        step_checks={"transform": TRANSFORM.check},
    )
    assert workflow.flow == FlowControl(
        Concurrency(10, "input.userId"), RateLimit(100, 60_000), 300_000
    )

"""Workflow definition: placeholder until the checked one lands."""

from dataclasses import dataclass

from serve_app.core.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class Step:
    id: str
    type: str
    settings: object
    needs: tuple
    when: str | None = None
    retry: RetryPolicy | None = None
    timeout_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Workflow:
    id: str
    description: str
    input_schema: object
    output: object
    has_output: bool
    timeout_ms: int | None
    retry: RetryPolicy
    steps: tuple
    document: object

    def step(self, step_id):
        return next(s for s in self.steps if s.id == step_id)


def parse_workflow(document, *, check_expression, check_schema, step_checks):
    steps = []
    prev = ()
    for raw in document["steps"]:
        kind = next(k for k in raw if k in step_checks)
        needs = tuple(raw.get("needs", prev))
        r = raw.get("retry")
        steps.append(
            Step(
                raw["id"],
                kind,
                raw[kind],
                needs,
                raw.get("when"),
                RetryPolicy(attempts=r["attempts"]) if r else None,
                raw.get("timeout"),
            )
        )
        prev = (raw["id"],)
    r = document.get("retry")
    return Workflow(
        document["id"],
        document.get("description", ""),
        document.get("input"),
        document.get("output"),
        "output" in document,
        None,
        RetryPolicy(attempts=r["attempts"]) if r else RetryPolicy(),
        tuple(steps),
        document,
    )


def ready_steps(workflow, done, started):
    return tuple(
        s for s in workflow.steps if s.id not in started and all(n in done for n in s.needs)
    )

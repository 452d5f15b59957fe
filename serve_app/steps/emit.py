"""`emit`: send an event; its output is `{id}`.

The event leaves with the commit that records the step: it is sent exactly when the step is done,
and once. It starts workflows and answers waiting steps as one that came over HTTP does.
"""

import json
from collections.abc import Sequence

from serve_app.core.app_events import HOPS_MAX, AppEvent, derived_event_id, event_name_problem
from serve_app.core.errors import Problem, StepFailedError
from serve_app.core.inference import JsonValue
from serve_app.core.step_forms import form_problems, member, text, text_problems
from serve_app.core.template import expressions_in
from serve_app.ports import StepCall, StepType

EVENT_BYTES_MAX = 262_144  # a relay holds many at once


def _check(settings: JsonValue) -> Sequence[Problem]:
    problems = form_problems("emit", settings, ("name",), ("data",))
    problems = problems or text_problems(settings, "name")
    name = member(settings, "name")
    if not problems and not expressions_in(name) and (problem := event_name_problem(name)):
        problems = [Problem(("name",), problem)]
    return problems


def _compute(call: StepCall) -> JsonValue:
    name, created = text(call.settings, "name"), call.created
    assert created is not None, "the planner gives it"
    problem = event_name_problem(name)
    if problem is not None:
        raise StepFailedError(f"name: {problem}", False)  # noqa: FBT003
    if created.hops >= HOPS_MAX:
        raise StepFailedError(f"events start each other at most {HOPS_MAX} deep", False)  # noqa: FBT003
    data = member(call.settings, "data")
    event = AppEvent(
        workspace=call.workspace,
        name=name,
        id=derived_event_id(call.idempotency_key),
        data={} if data is None else data,
        ts=0,
        execution_id=call.execution_id,
        key_id=created.key_id,
        hops=created.hops,
    )
    if len(json.dumps(event.data, ensure_ascii=False).encode()) > EVENT_BYTES_MAX:
        raise StepFailedError(f"the event takes more than {EVENT_BYTES_MAX} bytes", False)  # noqa: FBT003
    call.send(event)
    return {"id": event.id}


EMIT = StepType(check=_check, compute=_compute)

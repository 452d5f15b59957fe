"""`emit`: send an event; its output is `{id}`.

The event leaves with the commit that records the step, for the log `events` of the partition its id
names: it is sent exactly when the step is done, and once. Who starts workflows by it reads there.
"""

import hashlib
import json
from collections.abc import Sequence

from serve_app.core.errors import Problem, StepFailedError
from serve_app.core.inference import JsonValue
from serve_app.core.step_forms import form_problems, member, text, text_problems
from serve_app.ports import StepCall, StepType

EVENTS_LOG = "events"
EVENT_BYTES_MAX = 262_144  # a relay holds many at once


def _check(settings: JsonValue) -> Sequence[Problem]:
    problems = form_problems("emit", settings, ("name",), ("data",))
    return problems or text_problems(settings, "name")


def _compute(call: StepCall) -> JsonValue:
    digest = hashlib.sha256(call.idempotency_key.encode()).hexdigest()
    event_id = f"evt_{digest[:32]}"
    event = {
        "id": event_id,
        "name": text(call.settings, "name"),
        "data": member(call.settings, "data"),
        "workspace": call.workspace,
        "executionId": call.execution_id,
    }
    body = json.dumps(event, ensure_ascii=False).encode()
    if len(body) > EVENT_BYTES_MAX:
        raise StepFailedError(f"the event takes more than {EVENT_BYTES_MAX} bytes", False)  # noqa: FBT003
    call.send(EVENTS_LOG, event_id, body)
    return {"id": event_id}


EMIT = StepType(check=_check, compute=_compute)

"""The registry: which word in a definition names which step type."""

from collections.abc import Mapping

from serve_app.ports import Entropy, HttpClient, Schemas, StepType
from serve_app.services.children import Children
from serve_app.services.inference import Inference
from serve_app.steps.approval import APPROVAL
from serve_app.steps.echo import ECHO
from serve_app.steps.emit import EMIT
from serve_app.steps.generate import generate_step
from serve_app.steps.http import http_step
from serve_app.steps.publish import PUBLISH
from serve_app.steps.sleep import SLEEP
from serve_app.steps.transform import TRANSFORM
from serve_app.steps.wait_for_event import WAIT_FOR_EVENT
from serve_app.steps.workflow import workflow_step


def step_types(
    inference: Inference,
    schemas: Schemas,
    entropy: Entropy,
    http: HttpClient,
    http_answer_max_bytes: int,
    children: Children,
) -> Mapping[str, StepType]:
    """All step types, by the key that names them."""
    return {
        "echo": ECHO,
        "transform": TRANSFORM,
        "http": http_step(http, http_answer_max_bytes),
        "publish": PUBLISH,
        "emit": EMIT,
        "workflow": workflow_step(children),
        "sleep": SLEEP,
        "approval": APPROVAL,
        "wait_for_event": WAIT_FOR_EVENT,
        "generate": generate_step(inference, schemas, entropy),
    }

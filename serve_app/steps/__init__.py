"""The registry: which word in a definition names which step type."""

from collections.abc import Mapping

from serve_app.ports import Entropy, Schemas, StepType
from serve_app.services.inference import Inference
from serve_app.steps.echo import ECHO
from serve_app.steps.generate import generate_step
from serve_app.steps.transform import TRANSFORM


def step_types(inference: Inference, schemas: Schemas, entropy: Entropy) -> Mapping[str, StepType]:
    """All step types, by the key that names them."""
    return {
        "echo": ECHO,
        "transform": TRANSFORM,
        "generate": generate_step(inference, schemas, entropy),
    }

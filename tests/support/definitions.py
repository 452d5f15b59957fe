"""Workflows from YAML with the real expressions and step types, driven in virtual time."""

import re
from collections.abc import AsyncGenerator

import yaml

from serve_app.adapters.cel_expressions import CelExpressions
from serve_app.adapters.cronsim_schedules import CronSchedules
from serve_app.adapters.json_schema import JsonSchemas
from serve_app.core.definition import parse_workflow
from serve_app.core.execution import Execution
from serve_app.core.inference import (
    AdmitRequest,
    Chunk,
    FinishReason,
    GenerationRequest,
    Grant,
    JsonValue,
    Usage,
)
from serve_app.core.routing import Decision
from serve_app.core.workflow import Workflow
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
from tests.support.checker import entries_of_stored, journal_problems
from tests.support.rig import Rig, Run, Scripted
from tests.support.virtual_time import VirtualClock
from tests.support.workflows import EXECUTION_ID, ToyEntropy

PLAIN = {
    "echo": ECHO,
    "transform": TRANSFORM,
    "http": http_step(Scripted(), 1000),
    "publish": PUBLISH,
    "emit": EMIT,
    "sleep": SLEEP,
    "approval": APPROVAL,
    "wait_for_event": WAIT_FOR_EVENT,
}
EXPRESSIONS, SCHEMAS = CelExpressions(), JsonSchemas()


def parsed(steps: str, **members: object) -> Workflow:
    document = {"id": "wf", "steps": yaml.safe_load(steps), **members}
    checks = {name: kind.check for name, kind in PLAIN.items()}
    checks |= {"work": lambda _: (), "generate": Model().step_type.check}
    return parse_workflow(
        document,
        check_expression=EXPRESSIONS.check,
        check_schema=SCHEMAS.check,
        step_checks=checks,
        check_schedule=CronSchedules().check,
    )


class Model:
    """A router and a link to a model that says what a script says, one reply for each call."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.asked: list[GenerationRequest] = []
        entropy = ToyEntropy()
        self.step_type = generate_step(
            Inference(self, self, VirtualClock(), resume_wait_s=1.0), SCHEMAS, entropy
        )

    async def admit(self, request: AdmitRequest) -> Grant:
        return Grant(request.request_id, "host", "127.0.0.1", 1, 0, "")

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        return ()

    async def generate(
        self, grant: Grant, request: GenerationRequest
    ) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        words = re.findall(r"\s*\S+", self.replies.pop(0))
        for index, word in enumerate(words, start=1):
            is_last = index == len(words)
            usage = Usage(10, index) if is_last else None
            yield Chunk(word, (index,), FinishReason.STOP if is_last else None, usage)

    @property
    def heard(self) -> list[str]:
        """What it was told last, call by call."""
        return [request.messages[-1].content for request in self.asked]


def a_rig(steps: str, work: Run | None = None, **runs: Run) -> Rig:
    workflow = parsed(steps)
    names = {step_id for step_id in workflow._by_id if workflow._by_id[step_id].type == "work"}
    default = dict.fromkeys(names, work) if work is not None else {}
    return Rig(workflow, {**default, **runs}, expressions=EXPRESSIONS)


async def driven(rig: Rig, value: JsonValue = None, **created: object) -> Execution:
    ended = await rig.drive(input=value, **created)
    assert journal_problems(entries_of_stored(rig.store.journals[EXECUTION_ID])) == []
    return ended

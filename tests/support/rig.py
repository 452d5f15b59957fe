"""One driver on a store in memory, in virtual time: a workflow is run without a process."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

from serve_app.core.decisions import receive
from serve_app.core.due import RESULT_BYTES_MAX
from serve_app.core.execution import CancelRequested, ChunkEmitted, Event, Execution
from serve_app.core.inference import JsonValue
from serve_app.core.workflow import Workflow
from serve_app.ports import Expressions, HttpAnswer, HttpRequest, StepCall, StepType
from serve_app.services.planner import Runtime
from serve_app.services.runner import Driver
from serve_app.steps.approval import APPROVAL
from serve_app.steps.echo import ECHO
from serve_app.steps.emit import EMIT
from serve_app.steps.http import http_step
from serve_app.steps.publish import PUBLISH
from serve_app.steps.sleep import SLEEP
from serve_app.steps.transform import TRANSFORM
from serve_app.steps.wait_for_event import WAIT_FOR_EVENT
from tests.support.memory_store import MemoryStore
from tests.support.virtual_time import VirtualClock
from tests.support.workflows import CREATED, EXECUTION_ID, ToyEntropy, ToyExpressions

Run = Callable[[StepCall], Awaitable[JsonValue]]
TOKEN = "w1/1"


class Scripted:
    """An HTTP client to a server that finds issues."""

    async def request(self, request: HttpRequest) -> HttpAnswer:
        items = [f"issue of {json.loads(request.body)['q']}"]
        body = json.dumps({"items": items}).encode()
        return HttpAnswer(200, {"content-type": "application/json"}, body, is_cut=False)


@dataclass
class Rig:
    """One execution of a workflow whose `work` steps do what `runs` says, by step id."""

    workflow: Workflow
    runs: dict[str, Run] = field(default_factory=dict)
    compute: Callable[[StepCall], JsonValue] = lambda call: call.settings
    store: MemoryStore = field(default_factory=MemoryStore)
    calls: list[StepCall] = field(default_factory=list)
    expressions: Expressions = field(default_factory=ToyExpressions)
    result_bytes_max: int = RESULT_BYTES_MAX
    further_types: Mapping[str, StepType] = field(default_factory=dict)

    can_resume: bool = False

    async def driver(self, token: str = TOKEN, **created: object) -> Driver:
        """A driver that has just been handed the execution; the first call creates it."""
        clock = VirtualClock()
        accepted = replace(CREATED, at_ms=clock.now_ms(), **created)
        await self.store.create(EXECUTION_ID, accepted, "create", "")
        types = {
            "echo": ECHO,
            "transform": TRANSFORM,
            "http": http_step(Scripted(), 1000),
            "publish": PUBLISH,
            "emit": EMIT,
            "sleep": SLEEP,
            "approval": APPROVAL,
            "wait_for_event": WAIT_FOR_EVENT,
            "work": StepType(
                check=lambda settings: (), run=self._run, can_resume=lambda _: self.can_resume
            ),
            "pure": StepType(check=lambda settings: (), compute=self.compute),
            **self.further_types,
        }
        runtime = Runtime(
            self.store,
            types,
            self.expressions,
            clock,
            ToyEntropy(),
            result_bytes_max=self.result_bytes_max,
        )
        return Driver(self.store.own(EXECUTION_ID, token), self.workflow, runtime)

    async def drive(self, **created: object) -> Execution:
        """Drive a new execution until the driver lets go of it."""
        await (await self.driver(**created)).drive()
        return self.state

    async def _run(self, call: StepCall) -> JsonValue:
        self.calls.append(call)
        run = self.runs.get(call.step_id) or self.runs[call.step_id.rpartition("/")[2]]
        return await run(call)

    @property
    def state(self) -> Execution:
        return self.store.states[EXECUTION_ID]

    @property
    def events(self) -> list[Event]:
        """All after the first."""
        return self.store.events(EXECUTION_ID)[1:]

    def kinds(self) -> list[type[Event]]:
        return [type(event) for event in self.events]

    def commits(self) -> list[str]:
        """Commit ids in the order they got in, each once."""
        return list(dict.fromkeys(stored.commit_id for stored in self.store.journals[EXECUTION_ID]))

    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, ChunkEmitted))

    async def drive_to_the_end(self, **created: object) -> Execution:
        """Drive, and again whenever a parked execution's time has come."""
        await self.drive(**created)
        workers = 1
        while not self.state.is_terminal:
            workers += 1
            assert self.state.wake_at_ms is not None
            await asyncio.sleep(max(0, self.state.wake_at_ms - now_ms()) / 1000)
            await (await self.driver(f"w{workers}/{workers}")).drive()
        return self.state

    def signal(self, name: str, data: JsonValue = None, driver: Driver | None = None) -> None:
        """Somebody sends a signal; with a driver, its bell rings."""
        notice = self.store.append(EXECUTION_ID, *receive(self.state, name, data, now_ms()))
        if driver is not None:
            driver.notify(notice.events)

    def cancel(self, driver: Driver | None = None) -> None:
        """Somebody asks for an end; with a driver, its bell rings."""
        notice = self.store.append(EXECUTION_ID, CancelRequested(now_ms(), "enough"))
        if driver is not None:
            driver.notify(notice.events)


def now_ms() -> int:
    return VirtualClock().now_ms()

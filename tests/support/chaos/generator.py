"""Random workflows that are valid, and what is planned for each execution of them.

A seed gives the same definitions, inputs, signals, cancels and failures every time. All values that
a later step mentions are small integers, so that `oracle` can say what comes out without knowing
the engine. Expressions are CEL that Python reads the same way.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Document = dict[str, Any]

LEVELS = 3  # of workflows: each starts children of lower levels only
NESTING_MAX = 3
MODULUS = 997
SILENT = "long"  # what a wait's message says that nobody will answer


@dataclass
class Planned:
    """One execution that the driver shall start.

    Args:
        cancel_after_s: when somebody asks for its end, counted from its acceptance; None: nobody.
        is_followed: a reader reads its stream, cutting its own connection now and then.
    """

    key: str
    workflow_id: str
    input: Document
    cancel_after_s: float | None = None
    is_followed: bool = False
    priority: int = 0


@dataclass
class _Place:
    """Where steps are written: what they may mention, and how deep they stand."""

    seen: list[str]
    depth: int = 0
    is_repeated: bool = False  # in a map or a loop


@dataclass
class Generator:
    """Definitions for one run.

    Args:
        effects_url: of the receiver that `http` steps call.
        is_model_known: what the model says can be told before, so that later steps may mention it.
    """

    seed: int
    effects_url: str
    is_model_known: bool = True
    documents: list[Document] = field(default_factory=list)
    _count: int = 0
    _left: int = 0
    _level: int = 0
    _is_granted: bool = False  # the execution's own try, which one step may use up
    _younger: list[str] = field(default_factory=list)  # workflows that the present one may start

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def make(self, count: int) -> list[Document]:
        """So many workflows, children before their parents."""
        for index in range(count):
            level = index * LEVELS // count
            if level > self._level:
                self._level, self._younger = level, [one["id"] for one in self.documents]
            self.documents.append(self._workflow(f"w{index}"))
        self.documents.append(self._overdue())
        self.documents.append(self._endless())
        return self.documents

    def plans(self, count: int) -> list[Planned]:
        """So many executions of what was made."""
        rng = self.rng
        plans = []
        for index in range(count):
            document = rng.choice(self.documents)
            given: Document = {"n": rng.randrange(1, 4 if "cache" in document else 40)}
            if rng.random() < 0.03:
                given["pad"] = "x" * 100_000  # lies apart from the journal, by reference
            plan = Planned(f"{self.seed}-{index}", document["id"], given)
            if document["id"] == "endless" or rng.random() < 0.08:
                plan.cancel_after_s = rng.choice((0.0, rng.uniform(0, 3)))
            plan.is_followed = rng.random() < 0.35
            plan.priority = rng.choice((0, 0, 0, 5, -5))
            plans.append(plan)
        return plans

    def _workflow(self, workflow_id: str) -> Document:
        rng = self.rng
        self._count, self._left, self._is_granted = 0, rng.randrange(3, 12), False
        document: Document = {"id": workflow_id, "timeout": "240s"}
        if rng.random() < 0.2:
            document["retry"] = {"attempts": 1, "backoff": "fixed", "maxDelay": "100ms"}
            self._is_granted = True
        gate = rng.random()
        if gate < 0.25:
            # Whatever stands in its line waits for all of it, so it is short.
            self._left = min(self._left, 4)
            document["concurrency"] = {"limit": rng.randrange(2, 5)}
            if rng.random() < 0.5:
                document["concurrency"]["key"] = "input.n % 2"
        elif gate < 0.35:
            document["rateLimit"] = {"requests": 20, "window": "1s"}
        if rng.random() < 0.15:
            document["cache"] = {"ttl": "60s"}
        place = _Place(["input.n"])
        document["steps"] = self._steps(place)
        document["output"] = {"n": f"{{{{ {self._expression(place)} }}}}"}
        return document

    def _overdue(self) -> Document:
        steps = [{"id": "nap", "sleep": "60s"}, {"id": "last", "transform": "{{ input.n }}"}]
        return {"id": "overdue", "timeout": "700ms", "steps": steps}

    def _endless(self) -> Document:
        asking = {"message": SILENT, "timeout": "100s"}
        return {"id": "endless", "timeout": "120s", "steps": [{"id": "ask", "approval": asking}]}

    def _steps(self, place: _Place) -> list[Document]:
        steps = []
        for _ in range(self.rng.randrange(1, 4 if place.depth else 6)):
            if self._left > 0:
                self._left -= 1
                steps.append(self._step(place))
        step_id = self._id("t")
        steps.append({"id": step_id, "transform": f"{{{{ {self._expression(place)} }}}}"})
        place.seen.append(f"steps.{step_id}.output")
        return steps

    def _step(self, place: _Place) -> Document:
        simple: list[Callable[[_Place], Document]] = [
            self._transform, self._echo, self._http, self._http, self._http, self._generate,
            self._generate, self._sleep, self._approval, self._event, self._emit, self._publish,
        ]  # fmt: skip
        if self._younger:
            simple += [self._child, self._child]
        composites = [self._parallel, self._map, self._branch, self._loop]
        is_composite = place.depth < NESTING_MAX and self.rng.random() < 0.35
        return self.rng.choice(composites if is_composite else simple)(place)

    def _id(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count}"

    def _document(self, workflow_id: str) -> Document:
        return next(one for one in self.documents if one["id"] == workflow_id)

    def _expression(self, place: _Place) -> str:
        rng = self.rng
        first, second = rng.choice(place.seen), rng.choice(place.seen)
        factor, more = rng.randrange(1, 5), rng.randrange(10)
        return f"({first} * {factor} + {second} + {more}) % {MODULUS}"

    def _condition(self, place: _Place) -> str:
        return f"({self._expression(place)}) % 3 != 0"

    def _transform(self, place: _Place) -> Document:
        step_id = self._id("t")
        step = {"id": step_id, "transform": f"{{{{ {self._expression(place)} }}}}"}
        place.seen.append(f"steps.{step_id}.output")
        return step

    def _echo(self, place: _Place) -> Document:
        step_id = self._id("c")
        step = {"id": step_id, "echo": {"v": f"{{{{ {self._expression(place)} }}}}"}}
        place.seen.append(f"steps.{step_id}.output.v")
        return step

    def _http(self, place: _Place) -> Document:
        """One call; `fail` says how many attempts the receiver refuses, `ms` how it dawdles."""
        rng, step_id = self.rng, self._id("h")
        tries = rng.choice((0, 0, 1, 2))
        fail, status = rng.randrange(tries + 1), 503
        if self._is_granted and not place.depth and rng.random() < 0.4:
            self._is_granted, fail = False, tries + 1
        elif rng.random() < 0.03:
            fail, status = 100, rng.choice((400, 503))  # it never goes well
        slow_ms = rng.choice((0, 0, 0, 20, 60, 400))
        given = {"n": f"{{{{ {self._expression(place)} }}}}", "fail": fail, "status": status}
        step: Document = {
            "id": step_id,
            "http": {"method": "POST", "url": self.effects_url, "json": {**given, "ms": slow_ms}},
        }
        if tries:
            step["retry"] = {"attempts": tries, "backoff": "fixed", "maxDelay": "150ms"}
        if rng.random() < 0.1:
            step["when"] = self._condition(place)
        else:
            place.seen.append(f"steps.{step_id}.output.body.n")
        return step

    def _generate(self, place: _Place) -> Document:
        step_id = self._id("g")
        prompt = f"say {{{{ {self._expression(place)} }}}}"
        settings = {"prompt": prompt, "temperature": 0, "max_tokens": self.rng.randrange(3, 40)}
        if self.is_model_known:
            place.seen.append(f"size(steps.{step_id}.output)")
        return {"id": step_id, "generate": settings}

    def _sleep(self, place: _Place) -> Document:
        step: Document = {"id": self._id("s"), "sleep": f"{self.rng.choice((5, 50, 300, 900))}ms"}
        if self.rng.random() < 0.2:
            step["when"] = self._condition(place)
        return step

    def _approval(self, place: _Place) -> Document:
        step_id = self._id("a")
        if self.rng.random() < 0.3:
            return {"id": step_id, "approval": {"message": "short", "timeout": "200ms"}}
        place.seen.append(f"steps.{step_id}.output.data.n")
        return {"id": step_id, "approval": {"message": "asked", "timeout": "100s"}}

    def _event(self, place: _Place) -> Document:
        step_id = self._id("e")
        if self.rng.random() < 0.3:
            return {"id": step_id, "wait_for_event": {"event": "never/comes", "timeout": "200ms"}}
        place.seen.append(f"steps.{step_id}.output.data.n")
        return {"id": step_id, "wait_for_event": {"event": f"by/{step_id}", "timeout": "100s"}}

    def _emit(self, place: _Place) -> Document:
        data = {"n": f"{{{{ {self._expression(place)} }}}}"}
        return {"id": self._id("m"), "emit": {"name": "chaos/emitted", "data": data}}

    def _publish(self, place: _Place) -> Document:
        progress = self.rng.randrange(100)
        return {"id": self._id("p"), "publish": {"progress": progress, "message": "on the way"}}

    def _child(self, place: _Place) -> Document:
        step_id = self._id("w")
        child = self.rng.choice(self._younger)
        while place.is_repeated and "concurrency" in self._document(child):
            child = self.rng.choice(self._younger)
        given = {"n": f"{{{{ {self._expression(place)} }}}}"}
        place.seen.append(f"steps.{step_id}.output.n")
        return {"id": step_id, "workflow": {"id": child, "input": given}}

    def _inner(self, place: _Place, *more: str) -> _Place:
        is_repeated = place.is_repeated or bool(more)
        return _Place([*place.seen, *more], place.depth + 1, is_repeated)

    def _parallel(self, place: _Place) -> Document:
        step_id = self._id("x")
        names = ("left", "right", "third")[: self.rng.randrange(2, 4)]
        branches = {name: self._steps(self._inner(place)) for name in names}
        place.seen += [f"steps.{step_id}.output.{name}" for name in names]
        return {"id": step_id, "parallel": {"branches": branches}}

    def _map(self, place: _Place) -> Document:
        step_id, rng = self._id("y"), self.rng
        items = ", ".join(self._expression(place) for _ in range(rng.randrange(1, 5)))
        settings: Document = {"over": f"{{{{ [{items}] }}}}", "concurrency": rng.randrange(1, 4)}
        if rng.random() < 0.5:
            settings["onError"] = "skip"
        settings["steps"] = self._steps(self._inner(place, "item", "index"))
        place.seen.append(f"size(steps.{step_id}.output)")
        return {"id": step_id, "map": settings}

    def _branch(self, place: _Place) -> Document:
        step_id = self._id("b")
        cases = [
            {"when": self._condition(place), "steps": self._steps(self._inner(place))}
            for _ in range(self.rng.randrange(1, 3))
        ]
        other = self._steps(self._inner(place))
        place.seen.append(f"steps.{step_id}.output")
        return {"id": step_id, "branch": {"cases": cases, "else": other}}

    def _loop(self, place: _Place) -> Document:
        step_id = self._id("l")
        steps = self._steps(_Place([*place.seen], place.depth + 1, is_repeated=True))
        last = f"steps.{steps[-1]['id']}.output"
        settings = {
            "while": f"{last} == null || {last} % 4 != 0",
            "maxRounds": self.rng.randrange(1, 4),
            "steps": steps,
        }
        place.seen.append(f"steps.{step_id}.output")
        return {"id": step_id, "loop": settings}

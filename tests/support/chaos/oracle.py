"""What an execution of a generated workflow must give: an interpreter that is not the engine.

It reads the same document, runs every step in order, and says the result, the calls that must be
seen outside, and the signals that somebody must send. Knows no store, no time and no failure but
those that the document plans.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

_WHOLE = re.compile(r"^\{\{(.*)\}\}$", re.DOTALL)
_PART = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
Document = dict[str, Any]


class FailedError(Exception):
    """A step fails for good."""


class TimedOutError(FailedError):
    """The execution's deadline passes."""


@dataclass(frozen=True)
class Ask:
    """A signal that a wait needs; `family` are the steps that lead from child to child."""

    family: tuple[str, ...]
    name: str
    data: Document


@dataclass
class Expected:
    """How an execution must end, if nobody cancels it.

    Args:
        calls: (family, path, attempt) of calls that the receiver must see where it completes.
        loose: (family, path of an item) that fails and is forgiven: what is called in there depends
            on what runs beside it.
    """

    status: str = "completed"
    data: Any = None
    error_code: str | None = None
    calls: set[tuple[tuple[str, ...], str, int]] = field(default_factory=set)
    loose: set[tuple[tuple[str, ...], str]] = field(default_factory=set)
    asks: list[Ask] = field(default_factory=list)
    tokens: int = 0
    children: set[tuple[str, ...]] = field(default_factory=set)


class Oracle:
    """Says what executions of these documents give."""

    def __init__(self, documents: list[Document]) -> None:
        self._documents = {document["id"]: document for document in documents}

    def expected(self, workflow_id: str, given: Document) -> Expected:
        """How one of them ends."""
        expected = Expected()
        try:
            expected.data = self._workflow(workflow_id, given, (), expected)
        except TimedOutError:
            expected.status, expected.error_code = "failed", "TIMEOUT"
        except FailedError:
            expected.status, expected.error_code = "failed", "STEP_FAILED"
        return expected

    def _workflow(
        self, workflow_id: str, given: Document, family: tuple[str, ...], into: Expected
    ) -> Any:
        document = self._documents[workflow_id]
        run = _Run(self, family, into, int(document.get("retry", {}).get("attempts", 0)))
        names: Document = {"input": _plain(given), "steps": Bag()}
        last = run.block(document["steps"], "", names)
        return _fill(document["output"], names) if "output" in document else last

    def child(
        self, workflow_id: str, given: Document, family: tuple[str, ...], into: Expected
    ) -> Any:
        """Run another workflow inside a step; its time-out is the step's failure."""
        into.children.add(family)
        try:
            return self._workflow(workflow_id, given, family, into)
        except FailedError as error:
            raise FailedError(f"child: {error}") from error


@dataclass
class _Run:
    oracle: Oracle
    family: tuple[str, ...]
    into: Expected
    own_tries: int

    def block(self, steps: list[Document], prefix: str, names: Document) -> Any:
        value: Any = None
        for step in steps:
            value = None
            if "when" not in step or _value(step["when"], names):
                value = self.step(step, prefix + step["id"], names)
            names["steps"][step["id"]] = Bag(output=_plain(value))
        return value

    def step(self, step: Document, path: str, names: Document) -> Any:
        kind = next(key for key in step if key not in ("id", "when", "retry", "needs", "timeout"))
        return getattr(self, kind)(step, step[kind], path, names)

    def transform(self, step: Document, settings: Any, path: str, names: Document) -> Any:
        return _fill(settings, names)

    echo = transform

    def http(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        body = _fill(settings["json"], names)
        each = 1 + int(step.get("retry", {}).get("attempts", 0))
        fails = body["fail"]
        if fails and body["status"] == 400:
            self._called(path, 1)
            raise FailedError(path)
        # A forgiven item's step uses none of the execution's own tries.
        own = 0 if "/" in path else self.own_tries
        if fails >= each * (1 + own):
            self._called(path, each * (1 + own))
            raise FailedError(path)
        self.own_tries -= fails // each
        self._called(path, fails + 1)
        return {"status": 200, "body": {"n": answer(body["n"])}}

    def _called(self, path: str, attempts: int) -> None:
        self.into.calls |= {(self.family, path, one) for one in range(1, attempts + 1)}

    def generate(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        words = said(_fill(settings["prompt"], names), settings["max_tokens"])
        self.into.tokens += len(words)
        return "".join(words)

    def sleep(self, step: Document, settings: str, path: str, names: Document) -> Any:
        if settings == "60s":
            raise TimedOutError(path)

    def approval(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        if settings["message"] != "asked":
            return {"approved": False, "data": None}
        data = {"approved": True, "n": number_of(path)}
        self.into.asks.append(Ask(self.family, path, data))
        return {"approved": True, "data": data}

    def wait_for_event(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        if settings["timeout"] == "200ms":
            return None
        data = {"n": number_of(path)}
        self.into.asks.append(Ask(self.family, path, data))
        return {"name": path, "data": data}

    def emit(self, step: Document, settings: Any, path: str, names: Document) -> Any:
        return {}

    publish = emit

    def workflow(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        given = _fill(settings["input"], names)
        return self.oracle.child(settings["id"], given, (*self.family, path), self.into)

    def parallel(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        return {
            name: self.block(steps, f"{path}/{name}/", _inside(names))
            for name, steps in settings["branches"].items()
        }

    def map(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        gives: list[Any] = []
        for index, item in enumerate(_fill(settings["over"], names)):
            inner = {**_inside(names), "item": item, "index": index}
            before = (set(self.into.calls), list(self.into.asks))
            try:
                gives.append(self.block(settings["steps"], f"{path}/{index}/", inner))
            except FailedError:
                if settings.get("onError") != "skip":
                    raise
                # What was called in there, and what was waited for, depends on what failed first.
                self.into.calls = before[0]
                self.into.loose.add((self.family, f"{path}/{index}/"))
                gives.append(None)
        return gives

    def branch(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        for index, case in enumerate(settings["cases"]):
            if _value(case["when"], names):
                return self.block(case["steps"], f"{path}/{index}/", _inside(names))
        return self.block(settings["else"], f"{path}/else/", _inside(names))

    def loop(self, step: Document, settings: Document, path: str, names: Document) -> Any:
        last: Any = None
        before: Document = {one["id"]: Bag(output=None) for one in settings["steps"]}
        for index in range(settings["maxRounds"]):
            inner = _inside(names)
            inner["steps"].update(before)
            if not _value(settings["while"], inner):
                break
            last = self.block(settings["steps"], f"{path}/{index}/", inner)
            before = {one["id"]: inner["steps"][one["id"]] for one in settings["steps"]}
        return last


class Bag(dict[str, Any]):
    """An object whose members are also attributes."""

    __getattr__ = dict.__getitem__


def answer(number: int) -> int:
    """What the receiver makes of a number."""
    return (3 * number + 1) % 101


def said(prompt: str, max_tokens: int) -> list[str]:
    """What the scripted engine says: other words for other prompts."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return [f"{digest[index % 60 : index % 60 + 4]} " for index in range(max_tokens)]


def number_of(path: str) -> int:
    """The number that a signal for this wait brings."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:4], 16) % 50


def _inside(names: Document) -> Document:
    return {**names, "steps": Bag(names["steps"])}


def _fill(template: Any, names: Document) -> Any:
    if isinstance(template, dict):
        return {key: _fill(value, names) for key, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, names) for value in template]
    if not isinstance(template, str):
        return template
    if whole := _WHOLE.match(template):
        return _value(whole[1], names)
    return _PART.sub(lambda part: str(_value(part[1], names)), template)


def _value(expression: str, names: Document) -> Any:
    text = expression.replace("||", " or ").strip()
    known = {**names, "null": None, "size": len, "__builtins__": {}}
    return eval(text, known)  # of our own making


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return Bag({key: _plain(one) for key, one in value.items()})
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value

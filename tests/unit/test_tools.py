"""Tools of a `generate`: what the model is told, what is called, what goes wrong and is told."""

import json
from collections.abc import Mapping

import pytest

from serve_app.core.decisions import kept_for_retry
from serve_app.core.errors import InvalidWorkflowError, StepFailedError
from serve_app.core.execution import ChunkEmitted, Execution, Status, StepStatus
from serve_app.core.inference import JsonValue
from serve_app.core.template import Loc
from serve_app.core.tool_text import is_call
from serve_app.ports import StepCall
from tests.support.definitions import EXPRESSIONS, Model, driven, parsed
from tests.support.rig import Rig, Run
from tests.support.virtual_time import virtual_time
from tests.support.workflows import EXECUTION_ID

ASK = """
- id: ask
  generate:
    prompt: "Weather in {{ input.city }}?"
    temperature: 0
    max_tool_rounds: 2
    tools:
      - name: weather
        description: Says the weather of a city.
        parameters:
          {type: object, required: [city], properties: {city: {type: string, enum: [Oslo, Rome]}}}
        step: {work: {city: "{{ args.city }}", user: "{{ input.user }}"}}
      - name: clock
        description: Says what time it is.
        step: {transform: "{{ 'noon' }}"}
- {id: last, transform: "{{ steps.ask.output }}!"}
"""
INPUT = {"city": "Oslo", "user": "u1"}


def a_call(name: str, **arguments: JsonValue) -> str:
    return json.dumps({"tool_call": {"name": name, "arguments": arguments}})


def a_rig(model: Model, steps: str = ASK, run: Run | None = None) -> Rig:
    async def weather(call: StepCall) -> JsonValue:
        return {"sky": "clear", "asked": call.settings}

    return Rig(
        parsed(steps),
        {"ask.weather": run or weather},
        expressions=EXPRESSIONS,
        further_types={"generate": model.step_type},
    )


async def told(rig: Rig) -> Execution:
    return await driven(rig, INPUT)


@virtual_time
async def test_a_call_is_a_step_and_its_result_is_told() -> None:
    model = Model(a_call("weather", city="Oslo"), "It is clear.")
    rig = a_rig(model)
    ended = await told(rig)
    assert (ended.status, ended.data) == (Status.COMPLETED, "It is clear.!")
    assert list(ended.steps) == [
        "ask",
        "ask/0/ask.model",
        "ask/0/ask.weather",
        "ask/1/ask.model",
        "last",
    ]
    (call,) = rig.calls
    assert call.settings == {"city": "Oslo", "user": "u1"}
    assert call.idempotency_key == f"{EXECUTION_ID}/ask/0/ask.weather/1"
    assert model.heard == [
        "Weather in Oslo?",
        'Result of weather:\n{"sky": "clear", "asked": {"city": "Oslo", "user": "u1"}}',
    ]
    first, second = model.asked
    assert second.messages[: len(first.messages)] == first.messages
    assert second.messages[-2].content == a_call("weather", city="Oslo")
    assert ended.usage.prompt_tokens == 20
    assert rig.text() == "It is clear."  # the call is nobody's text


@virtual_time
async def test_an_answer_at_once_calls_nothing() -> None:
    rig = a_rig(Model("Cold."))
    ended = await told(rig)
    assert (ended.data, list(ended.steps)) == ("Cold.!", ["ask", "ask/0/ask.model", "last"])


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            a_call("wether", city="Oslo"),
            "there is no tool 'wether' to call now; there are: weather, clock",
        ),
        (a_call("weather", city="Bonn"), 'arguments.city: must be one of "Oslo", "Rome"'),
        (a_call("weather"), "arguments.city: is required: add it"),
        ('{"tool_call": {"name": "weather"', "the call is no JSON"),
        ('{"tool_call": {"name": "weather"}}', "a call has the form"),
        ('{"tool_call": {"name": "weather", "arguments": []}}', "a call has the form"),
        ('{"tool_call": [], "x": 1}', "a call has the form"),
    ],
)
def test_what_is_no_call_is_told_and_counts_as_a_round(reply: str, says: str) -> None:
    @virtual_time
    async def run() -> None:
        model = Model(reply, a_call("clock"), "Noon.")
        ended = await told(a_rig(model))
        assert ended.data == "Noon.!"
        assert model.heard[1].startswith("No tool was called: ")
        assert says in model.heard[1]
        assert (
            model.heard[2]
            == "Result of clock:\nnoon\n\nAnswer now: no tool can be called any more."
        )
        assert "ask/0/ask.weather" not in ended.steps

    run()


@virtual_time
async def test_after_the_last_round_whatever_it_says_is_the_answer() -> None:
    model = Model(a_call("clock"), a_call("clock"), a_call("clock"))
    ended = await told(a_rig(model))
    assert ended.data == a_call("clock") + "!"
    grammars = [bool(request.engine_options) for request in model.asked]
    assert grammars == [True, True, False]


@virtual_time
async def test_a_failing_tool_is_told_and_costs_no_try_of_the_execution() -> None:
    async def fail(call: StepCall) -> JsonValue:
        raise StepFailedError("no such city")

    model = Model(a_call("weather", city="Rome"), "I do not know.")
    rig = a_rig(model, run=fail)
    ended = await told(rig)
    assert (ended.data, ended.attempt) == ("I do not know.!", 1)
    assert model.heard[1] == "weather failed: no such city"
    assert ended.steps["ask/0/ask.weather"].status is StepStatus.FAILED
    assert len(rig.calls) == 1


@virtual_time
async def test_a_tool_has_a_retry_of_its_own() -> None:
    async def fail_once(call: StepCall) -> JsonValue:
        if call.attempt == 1:
            raise StepFailedError("busy")
        return "clear"

    steps = ASK.replace("step: {work:", "step: {retry: {attempts: 1}, work:")
    model = Model(a_call("weather", city="Rome"), "Clear.")
    rig = a_rig(model, steps, fail_once)
    await rig.drive_to_the_end(input=INPUT)
    assert (rig.state.data, model.heard[1]) == ("Clear.!", "Result of weather:\nclear")
    assert [call.idempotency_key[-2:] for call in rig.calls] == ["/1", "/2"]


@virtual_time
async def test_a_tool_may_fail_the_step() -> None:
    async def fail(call: StepCall) -> JsonValue:
        raise StepFailedError("no such city", False)

    steps = ASK.replace("- name: weather", "- name: weather\n        on_error: fail")
    ended = await told(a_rig(Model(a_call("weather", city="Rome")), steps, fail))
    assert ended.status is Status.FAILED
    assert ended.error == "step ask/0/ask.weather: no such city"


@virtual_time
async def test_a_broken_turn_fails_the_step() -> None:
    steps = ASK.replace("temperature: 0", "output_schema: {type: object}")
    ended = await told(a_rig(Model("no JSON"), steps))
    assert ended.status is Status.FAILED
    assert (
        ended.error
        == "step ask/0/ask.model: the answer is no JSON: " + ended.error.partition("JSON: ")[2]
    )


@virtual_time
async def test_a_choice_forces_the_first_call_alone() -> None:
    for choice, first in (
        ("required", ("weather", "clock")),
        ("{type: function, function: {name: clock}}", ("clock",)),
    ):
        model = Model("I would say", a_call("clock"), "Noon.")
        ended = await told(a_rig(model, ASK.replace("temperature: 0", f"tool_choice: {choice}")))
        assert ended.data == "Noon.!"
        texts = [_grammar(request.engine_options) for request in model.asked]
        assert all("start: call\n" in text for text in texts[:2])
        assert [f'"\\"{name}\\""' in texts[0] for name in ("weather", "clock")] == [
            "weather" in first,
            "clock" in first,
        ]
        assert texts[2] == ""  # the last round


@virtual_time
async def test_a_killed_worker_repeats_no_finished_call() -> None:
    """It dies with the second call under way: that one is repeated, under the same key."""
    model = Model(a_call("weather", city="Oslo"), a_call("weather", city="Rome"), "Both clear.")
    calls: list[str] = []

    class Killed(BaseException):
        """As the end of a process: nothing is reported."""

    async def weather(call: StepCall) -> JsonValue:
        calls.append(call.idempotency_key)
        if len(calls) == 2:
            raise Killed
        return "clear"

    rig = a_rig(model, run=weather)
    driver = await rig.driver(input=INPUT)
    with pytest.raises(BaseExceptionGroup):
        await driver.drive()
    await (await rig.driver("w2/2")).drive()
    assert rig.state.data == "Both clear.!"
    assert [key.removeprefix(f"{EXECUTION_ID}/ask/") for key in calls] == [
        "0/ask.weather/1",
        "1/ask.weather/1",
        "1/ask.weather/1",
    ]
    assert len(model.asked) == 3


@virtual_time
async def test_a_cancel_ends_a_call_under_way() -> None:
    async def weather(call: StepCall) -> JsonValue:
        rig.cancel(driver)
        raise StepFailedError("too late")

    rig = a_rig(Model(a_call("weather", city="Oslo")), run=weather)
    driver = await rig.driver(input=INPUT)
    await driver.drive()
    assert rig.state.status is Status.CANCELLED


@virtual_time
async def test_a_retry_keeps_it_as_a_whole() -> None:
    rig = a_rig(Model(a_call("clock"), "Noon."))
    ended = await told(rig)
    assert kept_for_retry(ended, rig.workflow, "last") == {"ask": "Noon."}
    assert kept_for_retry(ended, rig.workflow, "ask") == {}


@virtual_time
async def test_an_answer_with_a_schema_may_stand_beside_a_call() -> None:
    steps = ASK.replace("temperature: 0", "output_schema: {type: object, required: [sky]}")
    model = Model(a_call("clock"), '{"sky": "clear"}')
    rig = a_rig(model, steps.replace("{{ steps.ask.output }}!", "{{ steps.ask.output.sky }}"))
    ended = await told(rig)
    assert ended.data == "clear"
    assert 'answer: %json {"type": "object", "required": ["sky"]' in _grammar(
        model.asked[0].engine_options
    )
    assert rig.text() == '{"sky": "clear"}'


@virtual_time
async def test_a_tool_may_hold_steps() -> None:
    steps = ASK.replace(
        "{transform: \"{{ 'noon' }}\"}",
        """
          parallel:
            branches:
              here: [{id: one, transform: "{{ 'noon' }}"}]
              there: [{id: two, transform: "{{ size(args) }}"}]""",
    )
    model = Model(a_call("clock"), "Noon.")
    ended = await told(a_rig(model, steps))
    assert model.heard[1] == 'Result of clock:\n{"here": "noon", "there": 0}'
    assert "ask/0/ask.clock/there/two" in ended.steps


BAD: list[tuple[dict[str, object], Loc]] = [
    ({"tools": []}, ("tools",)),
    ({"tools": "weather"}, ("tools",)),
    ({"max_tool_rounds": 3}, ("tools",)),
    ({"tools": [3]}, ("tools", 0)),
    ({"tools": [{}]}, ("tools", 0, "name")),
    ({"tools": [{"name": "a b"}]}, ("tools", 0, "name")),
    ({"tools": [{"name": "model"}]}, ("tools", 0, "name")),
    ({"tools": [{"name": "a"}, {"name": "a"}]}, ("tools", 1, "name")),
    ({"tools": [{"name": "a", "descripton": "x"}]}, ("tools", 0, "descripton")),
    ({"tools": [{"name": "a"}]}, ("tools", 0, "description")),
    ({"tools": [{"name": "a", "description": "{{ input.x }}"}]}, ("tools", 0, "description")),
    ({"tools": [{"name": "a", "parameters": {"type": "string"}}]}, ("tools", 0, "parameters")),
    (
        {"tools": [{"name": "a", "parameters": {"type": "object", "required": 3}}]},
        ("tools", 0, "parameters"),
    ),
    ({"tools": [{"name": "a", "on_error": "skip"}]}, ("tools", 0, "on_error")),
    ({"tools": [{"name": "a"}]}, ("tools", 0, "step")),
    ({"tools": [{"name": "a", "step": {"id": "b", "echo": {}}}]}, ("tools", 0, "step", "id")),
    ({"tools": [{"name": "a", "step": {"http": {}}}]}, ("tools", 0, "step", "http", "method")),
    (
        {"tools": [{"name": "a", "step": {"transform": "{{ steps.ask.output }}"}}]},
        ("tools", 0, "step", "transform"),
    ),
    ({"max_tool_rounds": 0}, ("max_tool_rounds",)),
    ({"max_tool_rounds": 51}, ("max_tool_rounds",)),
    ({"tool_choice": "maybe"}, ("tool_choice",)),
    ({"tool_choice": {"type": "function", "function": {"name": "b"}}}, ("tool_choice",)),
    ({"prompt": "{{ args.city }}"}, ("prompt",)),
    ({"temperature": 9}, ("temperature",)),
]


@pytest.mark.parametrize(("settings", "loc"), BAD)
def test_a_mistake_is_refused_with_its_place(settings: Mapping[str, object], loc: Loc) -> None:
    steps = json.dumps([{"id": "ask", "generate": {"prompt": "x", **settings}}])
    with pytest.raises(InvalidWorkflowError) as refused:
        parsed(steps)
    assert ("steps", 0, "generate", *loc) in [problem.loc for problem in refused.value.problems]


def test_tools_count_among_the_steps_of_a_workflow() -> None:
    tools = [{"name": f"t{n}", "description": "d", "step": {"echo": {}}} for n in range(30)]
    steps = [{"id": f"s{n}", "generate": {"prompt": "x", "tools": tools}} for n in range(4)]
    with pytest.raises(InvalidWorkflowError, match="at most 100 steps"):
        parsed(json.dumps(steps))
    parsed(json.dumps(steps[:3]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("{", None),
        (' {\n "tool_', None),
        ('{"tool_call"', True),
        (' { "tool_call" : {', True),
        ('{"tool_calls"', False),
        ("{}", False),
        ("Hello", False),
        ('["tool_call"', False),
    ],
)
def test_a_reply_is_known_by_its_beginning(text: str, expected: bool | None) -> None:
    assert is_call(text) is expected


def test_no_text_is_streamed_before_it_is_known_to_be_one() -> None:
    @virtual_time
    async def run() -> None:
        rig = a_rig(Model('{ "sky": "clear"}'))
        await told(rig)
        chunks = [event for event in rig.events if isinstance(event, ChunkEmitted)]
        assert "".join(chunk.text for chunk in chunks) == '{ "sky": "clear"}'
        assert [token for chunk in chunks for token in chunk.token_ids] == [1, 2, 3]

    run()


def _grammar(options: Mapping[str, JsonValue]) -> str:
    outputs = options.get("structured_outputs")
    return str(outputs["grammar"]) if isinstance(outputs, Mapping) else ""

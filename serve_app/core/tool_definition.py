"""The tools of a `generate` step in a definition: their form, and the steps they become.

Owns `tools`, `tool_choice` and `max_tool_rounds`. Does not know how a step is parsed: the caller
hands that in. Invariant: what a composite's settings hold of its tools has its defaults filled in,
so that nothing at run time decides by what is missing.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from serve_app.core.definition_checks import Checks
from serve_app.core.inference import JsonValue
from serve_app.core.step_graph import Level, Place
from serve_app.core.template import OPEN, Loc, texts_in
from serve_app.core.tools import MODEL, ROUNDS_DEFAULT, ROUNDS_MAX, model_id, tool_id
from serve_app.core.workflow import GENERATE, Block, Step

TOOL_SETTINGS = ("tools", "tool_choice", "max_tool_rounds")  # of a generate step
TOOL_KEYS = ("name", "description", "parameters", "on_error", "step")
TOOLS_MAX = 32
DESCRIPTION_CHARS_MAX = 2_000
CHOICES = ("auto", "required", "none")
ON_ERROR = ("tell", "fail")
NO_PARAMETERS: Mapping[str, JsonValue] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)  # OpenAI's form

Body = Callable[[JsonValue, str, Loc, Place], Step]
CheckSchema = Callable[[object], str | None]


class ToolForms:
    """The tools of one definition; `body` parses the step of one, under the id it is given."""

    def __init__(self, checks: Checks, check_schema: CheckSchema, body: Body) -> None:
        self._checks = checks
        self._check_schema = check_schema
        self._body = body

    def with_tools(
        self, model: Step, settings: Mapping[str, JsonValue], level: Level
    ) -> tuple[Mapping[str, JsonValue], tuple[Block, ...]]:
        """The settings and blocks of a `generate` that has tools.

        Args:
            model: one turn of it, as a step of its own.
            settings: as they stand in the definition.
            level: of its tools; takes their ids.
        """
        found, loc = settings.get("tools"), level.loc
        tools: list[JsonValue] = []
        steps: list[Step] = [replace(model, id=model_id(model.id), needs=(), when=None)]
        if not isinstance(found, list) or not 1 <= len(found) <= TOOLS_MAX:
            self._checks.note(loc, f"is a list of 1 to {TOOLS_MAX} tools")
            found = []
        names: set[str] = set()
        for index, one in enumerate(found):
            level.steps.append(("", ()))
            if not isinstance(one, Mapping):
                self._checks.note((*loc, index), f"a tool is an object of {', '.join(TOOL_KEYS)}")
                continue
            name = self._name(one, (*loc, index), names)
            names.add(name)
            level.steps[index] = (tool_id(model.id, name), ())
            tools.append(self._tool(one, name, (*loc, index)))
            place, at = Place(level, index), (*loc, index, "step")
            steps.append(self._body(one.get("step"), tool_id(model.id, name), at, place))
        own: dict[str, JsonValue] = {
            "tools": tools,
            "tool_choice": self._choice(settings, names, loc[:-1]),
            "max_tool_rounds": self._rounds(settings, loc[:-1]),
        }
        return own, (Block("", tuple(steps)),)

    def _name(self, tool: Mapping[str, JsonValue], loc: Loc, names: set[str]) -> str:
        self._checks.refuse_unknown(tool, loc, TOOL_KEYS)
        found, loc = tool.get("name"), (*loc, "name")
        if not isinstance(found, str) or not _NAME.fullmatch(found):
            self._checks.note(loc, "is required: text of 1 to 64 letters, digits, _ and -")
            return ""
        if found == MODEL:
            self._checks.note(loc, f"{MODEL} is what a turn of the model is called: choose another")
        elif found in names:
            self._checks.note(loc, f"{found} is the name of an earlier tool too")
        return found

    def _tool(self, tool: Mapping[str, JsonValue], name: str, loc: Loc) -> JsonValue:
        description = tool.get("description")
        is_text = isinstance(description, str) and 0 < len(description) <= DESCRIPTION_CHARS_MAX
        if not is_text:
            self._checks.note(
                (*loc, "description"),
                f"is required: text of at most {DESCRIPTION_CHARS_MAX} characters for the model",
            )
        parameters = tool.get("parameters", NO_PARAMETERS)
        if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
            self._checks.note((*loc, "parameters"), "is a JSON Schema of {type: object}")
        elif (problem := self._check_schema(parameters)) is not None:
            self._checks.note((*loc, "parameters"), f"is no JSON Schema: {problem}")
        on_error = tool.get("on_error", ON_ERROR[0])
        if on_error not in ON_ERROR:
            self._checks.note((*loc, "on_error"), f"is one of {', '.join(ON_ERROR)}")
        for key in ("description", "parameters"):
            for text_loc, text in texts_in(tool.get(key), (*loc, key)):
                if OPEN in text:
                    self._checks.note(text_loc, "holds no expression: a tool is always the same")
        return {
            "name": name,
            "description": description,
            "parameters": parameters,
            "on_error": on_error,
        }

    def _choice(self, settings: Mapping[str, JsonValue], names: set[str], loc: Loc) -> JsonValue:
        choice = settings.get("tool_choice", CHOICES[0])
        if isinstance(choice, str) and choice in CHOICES:
            return choice
        function = choice.get("function") if isinstance(choice, Mapping) else None
        named = function.get("name") if isinstance(function, Mapping) else None
        if named in names and choice == {"type": "function", "function": {"name": named}}:
            return choice
        form = "{type: function, function: {name: <one of the tools>}}"
        self._checks.note((*loc, "tool_choice"), f"is one of {', '.join(CHOICES)}, or {form}")
        return CHOICES[0]

    def _rounds(self, settings: Mapping[str, JsonValue], loc: Loc) -> int:
        rounds = settings.get("max_tool_rounds", ROUNDS_DEFAULT)
        if type(rounds) is int and 1 <= rounds <= ROUNDS_MAX:
            return rounds
        self._checks.note((*loc, "max_tool_rounds"), f"is a number from 1 to {ROUNDS_MAX}")
        return ROUNDS_DEFAULT


def is_with_tools(step_type: str, settings: JsonValue) -> bool:
    """Whether these settings make a composite of a step."""
    return (
        step_type == GENERATE
        and isinstance(settings, Mapping)
        and any(key in settings for key in TOOL_SETTINGS)
    )

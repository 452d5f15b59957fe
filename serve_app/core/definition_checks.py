"""The forms that all parts of a definition share: ids, durations, retries, expressions.

Owns how a mistake becomes a `Problem` with its place. Does not know what a definition looks like.
Invariant: problems are gathered, never raised, so that an author sees all of them at once.
"""

import re
from collections.abc import Callable, Collection, Mapping

from serve_app.core.errors import Problem
from serve_app.core.inference import JsonValue
from serve_app.core.retry import Backoff, RetryPolicy
from serve_app.core.step_graph import Mention, Place
from serve_app.core.template import Loc, TemplateError, split, texts_in
from serve_app.core.workflow import parse_duration_ms

ATTEMPTS_MAX = 100  # tries after the first
RETRY_KEYS = ("attempts", "backoff", "maxDelay")


CheckSchedule = Callable[[str, str], tuple[str, str] | None]


class Checks:
    """The problems and the expressions found so far."""

    def __init__(
        self,
        check_expression: Callable[[str], str | None],
        check_schedule: CheckSchedule | None = None,
    ) -> None:
        self.problems: list[Problem] = []
        self.mentions: list[Mention] = []
        self._check_expression = check_expression
        self._check_schedule = check_schedule

    def note(self, loc: Loc, message: str) -> None:
        """Something is wrong at this place."""
        self.problems.append(Problem(loc, message))

    def schedule(self, cron: str, timezone: str) -> tuple[str, str] | None:
        """Why there is no such schedule: the member that is wrong, and the reason."""
        if self._check_schedule is None:
            return "cron", "nothing here keeps time"
        return self._check_schedule(cron, timezone)

    def refuse_unknown(
        self,
        value: Mapping[str, JsonValue],
        loc: Loc,
        known: Collection[str],
        to_come: Collection[str] = (),
    ) -> None:
        """Every key is known, so that a misspelt one is never passed over."""
        for key in value:
            if key in to_come:
                self.note((*loc, key), f"this release does not carry out {key}: remove it")
            elif key not in known:
                self.note((*loc, key), f"unknown key; known: {', '.join(known)}")

    def identifier(
        self, value: Mapping[str, JsonValue], loc: Loc, pattern: re.Pattern[str], allowed: str
    ) -> str:
        """The member `id`; "" where there is none of this form."""
        found = value.get("id")
        if isinstance(found, str) and pattern.fullmatch(found):
            return found
        self.note((*loc, "id"), f"is required: text of 1 to 64 {allowed}")
        return ""

    def duration(self, value: Mapping[str, JsonValue], key: str, loc: Loc) -> int | None:
        """A member that is a duration, in ms; None where there is none."""
        if key not in value:
            return None
        try:
            return parse_duration_ms(value[key])
        except ValueError as error:
            self.note((*loc, key), str(error))
            return None

    def retry(self, value: Mapping[str, JsonValue], loc: Loc) -> RetryPolicy | None:
        """The member `retry`; None where there is none."""
        if "retry" not in value:
            return None
        retry, loc = value["retry"], (*loc, "retry")
        if not isinstance(retry, Mapping):
            self.note(loc, "is an object, such as {attempts: 2}")
            return None
        self.refuse_unknown(retry, loc, RETRY_KEYS)
        attempts = retry.get("attempts")
        if not (type(attempts) is int and 0 <= attempts <= ATTEMPTS_MAX):
            self.note((*loc, "attempts"), f"is required: an integer from 0 to {ATTEMPTS_MAX}")
            attempts = 0
        backoff = retry.get("backoff", Backoff.EXPONENTIAL.value)
        if backoff not in tuple(Backoff):
            self.note((*loc, "backoff"), f"is one of {', '.join(Backoff)}")
            backoff = Backoff.EXPONENTIAL.value
        max_delay_ms = self.duration(retry, "maxDelay", loc) or RetryPolicy().max_delay_ms
        return RetryPolicy(attempts, Backoff(str(backoff)), max_delay_ms)

    def expressions(self, value: JsonValue, loc: Loc, place: Place) -> bool:
        """Check all templates of a value; whether they parse."""
        problem_count = len(self.problems)
        for text_loc, text in texts_in(value, loc):
            try:
                pieces = split(text)
            except TemplateError as error:
                self.note(text_loc, str(error))
                continue
            for piece in pieces:
                if piece.is_expression:
                    self.expression(piece.text, text_loc, place)
        return len(self.problems) == problem_count

    def expression(self, text: str, loc: Loc, place: Place) -> None:
        """Check one expression."""
        problem = self._check_expression(text)
        if problem is None:
            self.mentions.append(Mention(loc, text, place))
        else:
            self.note(loc, f"{text[:100]!r} is no CEL expression: {problem}")

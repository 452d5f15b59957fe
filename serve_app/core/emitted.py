"""What a step that runs has emitted so far, as its journal has it.

Owns that fold. A worker that takes an execution over goes on behind these tokens instead of making
them again. Invariant: what was emitted before a start or a retry of the step belongs to another
attempt and is no part of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.core.execution import ChunkEmitted, Event, StepRetrying, StepStarted


@dataclass(frozen=True, slots=True)
class Emitted:
    """All chunks of one attempt, joined; the text is that of the tokens, as far as it was shown."""

    text: str = ""
    token_ids: tuple[int, ...] = ()


NOTHING = Emitted()


def emitted_by_steps(events: Iterable[Event]) -> dict[str, Emitted]:
    """By step, what its last attempt has emitted; steps that emitted no token are left out."""
    chunks: dict[str, list[ChunkEmitted]] = {}
    for event in events:
        match event:
            case StepStarted(step_id=step_id) | StepRetrying(step_id=step_id):
                chunks[step_id] = []
            case ChunkEmitted(step_id=step_id):
                chunks.setdefault(step_id, []).append(event)
            case _:
                pass
    joined = {
        step_id: Emitted(
            "".join(chunk.text for chunk in parts),
            tuple(token for chunk in parts for token in chunk.token_ids),
        )
        for step_id, parts in chunks.items()
    }
    return {step_id: emitted for step_id, emitted in joined.items() if emitted.token_ids}

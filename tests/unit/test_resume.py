"""How an answer goes on: which way, what is swallowed, what is marked; every cut of an answer."""

from dataclasses import replace

import pytest

from serve_app.core.errors import ConnectionFailedError
from serve_app.core.inference import (
    Chunk,
    ChunkDetails,
    FinishReason,
    GenerationRequest,
    Message,
    Resumed,
    Usage,
)
from serve_app.core.resume import Answer, DivergedError

PLAIN = GenerationRequest("r", (Message("user", "hi"),), max_tokens=6, temperature=0.0)
SEEDED = replace(PLAIN, temperature=1.0, seed=7)
TEXTS = ("Al", "l ", "", "is ", "well", ".")  # the third token's character is not complete yet
USAGE = Usage(10, 6, 8)


def chunks_of(request: GenerationRequest, texts: tuple[str, ...] = TEXTS) -> list[Chunk]:
    """What an engine that honours `resume_ids` sends, a token at a time, the last with the end."""
    known = len(request.resume_ids)
    made, held = [], []
    for index, text in enumerate(texts):
        if index < known:
            continue
        held.append(index)
        is_last = index == len(texts) - 1
        if text or is_last:
            end = (FinishReason.LENGTH, USAGE) if is_last else (None, None)
            made.append(Chunk(text, tuple(held), *end))
            held = []
    return made


def merged(chunks: list[Chunk]) -> Chunk:
    return Chunk(
        "".join(one.text for one in chunks),
        tuple(token for one in chunks for token in one.token_ids),
        chunks[-1].finish_reason,
        chunks[-1].usage,
    )


def begun(request: GenerationRequest, count: int) -> Answer:
    """An answer that was lost after so many chunks."""
    answer = Answer(request)
    asked = answer.next_request()
    for chunk in chunks_of(asked)[:count]:
        answer.take(chunk)
    return answer


def test_the_first_attempt_is_the_request_itself() -> None:
    answer = Answer(PLAIN)
    assert answer.next_request() is PLAIN
    [first, *_] = chunks_of(PLAIN)
    out = answer.take(first)
    assert out == Chunk("Al", (0,), usage=Usage(completion_tokens=1))


def test_an_attempt_that_brought_nothing_starts_again_unmarked() -> None:
    answer = Answer(PLAIN)
    answer.next_request()
    again = answer.next_request()
    assert (again.request_id, again.resume_ids) == ("r~2", ())
    out = answer.take(chunks_of(again)[0])
    assert out is not None
    assert out.resumed is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("request_", [PLAIN, SEEDED], ids=["continue", "replay"])
@pytest.mark.parametrize("is_merged", [False, True])
def test_no_token_and_no_character_twice_or_missing(
    count: int, request_: GenerationRequest, *, is_merged: bool
) -> None:
    answer = begun(request_, count)
    known_ids = list(answer.token_ids)
    assert answer.text_length == len("".join(TEXTS[: len(known_ids)]))
    known_text = "".join(TEXTS[: len(known_ids)])
    asked = answer.next_request()
    assert asked.resume_ids == (tuple(known_ids) if request_ is PLAIN else ())
    chunks = chunks_of(asked)
    if is_merged:
        chunks = [merged(chunks)]
    rest = [out for chunk in chunks if (out := answer.take(chunk)) is not None]
    assert known_ids + [token for out in rest for token in out.token_ids] == [0, 1, 2, 3, 4, 5]
    assert known_text + "".join(out.text for out in rest) == "All is well."
    assert {out.resumed for out in rest} == {Resumed.EXACT}
    assert rest[-1].finish_reason is FinishReason.LENGTH
    assert rest[-1].usage == USAGE


def test_text_that_a_stop_string_held_back_comes_with_the_replay() -> None:
    answer = Answer(replace(SEEDED, stop=("zz",)))
    answer.next_request()
    answer.take(Chunk("A", (0, 1)))  # "ll" is held: it might have been the stop string
    answer.next_request()
    out = answer.take(Chunk("All", (0, 1), FinishReason.STOP, Usage(10, 2)))
    assert out is not None
    assert (out.text, out.token_ids, out.finish_reason) == ("ll", (), FinishReason.STOP)


def test_a_replay_that_differs_is_left_and_the_rest_is_marked() -> None:
    answer = begun(SEEDED, 2)
    answer.next_request()
    assert answer.take(Chunk("Al", (0,))) is None
    with pytest.raises(DivergedError):
        answer.take(Chunk("x", (99,)))
    answer.diverged()
    asked = answer.next_request()
    assert (asked.resume_ids, asked.request_id) == ((0, 1), "r~3")
    out = answer.take(chunks_of(asked)[0])
    assert out is not None
    assert out.resumed is Resumed.APPROXIMATE


def test_a_replay_that_ends_early_differs() -> None:
    answer = begun(SEEDED, 3)
    answer.next_request()
    with pytest.raises(DivergedError):
        answer.take(Chunk("Al", (0,), FinishReason.STOP, Usage(10, 1)))


@pytest.mark.parametrize(
    ("changes", "is_continued", "mark"),
    [
        ({}, True, Resumed.EXACT),
        ({"temperature": 0.7}, True, Resumed.APPROXIMATE),
        ({"temperature": 0.7, "seed": 1}, False, Resumed.EXACT),
        ({"engine_options": {"presence_penalty": 1.0}}, False, Resumed.EXACT),
        ({"engine_options": {"bad_words": ["no"]}}, False, Resumed.EXACT),
        ({"engine_options": {"logprobs": 2, "min_tokens": 3}}, True, Resumed.EXACT),
        ({"temperature": 0.7, "engine_options": {"presence_penalty": 1.0}}, True, "approximate"),
        ({"output_schema": {"type": "object"}}, True, Resumed.EXACT),
        ({"output_schema": {}, "engine_options": {"reasoning_ended": True}}, False, Resumed.EXACT),
    ],
)
def test_the_way_follows_from_the_request(
    changes: dict[str, object], mark: Resumed, *, is_continued: bool
) -> None:
    answer = begun(replace(PLAIN, **changes), 2)
    asked = answer.next_request()
    assert bool(asked.resume_ids) is is_continued
    outs = [answer.take(chunk) for chunk in chunks_of(asked)]
    assert outs[-1] is not None
    assert outs[-1].resumed == mark


def test_a_guided_thought_that_cannot_be_replayed_is_given_up() -> None:
    options = {"reasoning_ended": False, "structured_outputs": {"json": "{}"}}
    answer = begun(replace(PLAIN, temperature=1.0, engine_options=options), 2)
    with pytest.raises(ConnectionFailedError, match="guided"):
        answer.next_request()


def test_an_answer_at_its_limit_is_complete_unless_text_may_be_held() -> None:
    for request, is_complete in ((PLAIN, True), (replace(PLAIN, stop=("x",)), False)):
        answer = Answer(request, token_ids=list(range(6)), text_length=12)
        assert answer.is_complete is is_complete
    end = Answer(PLAIN, token_ids=list(range(6))).end()
    assert end.finish_reason is FinishReason.LENGTH
    held = Answer(replace(PLAIN, stop=("x",)), token_ids=list(range(6)))
    assert held.next_request().resume_ids == ()  # made again, to hear what was held


def test_log_probabilities_of_swallowed_tokens_are_swallowed() -> None:
    scores = tuple(((token, -0.5, 1, None),) for token in range(3))
    answer = begun(replace(SEEDED, engine_options={"logprobs": 1}), 2)
    answer.next_request()
    details = ChunkDetails(scores, scores, None)
    out = answer.take(Chunk("All is", (0, 1, 2), details=details))
    assert out is not None
    assert out.details == ChunkDetails(scores[2:], (), None)


def test_the_bill_is_the_whole_answers() -> None:
    answer = begun(PLAIN, 2)
    asked = answer.next_request()
    outs = [out for chunk in chunks_of(asked) if (out := answer.take(chunk)) is not None]
    counts = [out.usage.completion_tokens for out in outs if out.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert answer.usage.cached_tokens <= answer.usage.prompt_tokens

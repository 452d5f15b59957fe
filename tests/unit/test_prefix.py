"""Prefix hashes: equal beginnings, whole blocks, bounds; the index of what a replica holds."""

import pytest

from serve_app.core.inference import GenerationRequest, Message
from serve_app.core.prefix import (
    BLOCK_CHARS,
    BLOCK_TOKENS,
    BLOCKS_MAX,
    PrefixIndex,
    prefix_of,
    prefix_of_messages,
    prefix_of_tokens,
    prompt_tokens_guess,
)

SYSTEM = Message("system", "You help. " * 100)


def chat(*contents: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return (SYSTEM, *(Message(roles[n % 2], text) for n, text in enumerate(contents)))


def test_a_later_turn_begins_with_the_earlier_ones() -> None:
    first = prefix_of_messages(chat("a" * 500))
    second = prefix_of_messages(chat("a" * 500, "b" * 300, "c" * 300))
    assert len(second) > len(first) > 3
    assert second[: len(first)] == first


def test_one_character_changes_its_block_and_all_after_it() -> None:
    text = "x" * (4 * BLOCK_CHARS)
    other = text[: BLOCK_CHARS + 50] + "y" + text[BLOCK_CHARS + 51 :]
    left = prefix_of_messages((Message("user", text),))
    right = prefix_of_messages((Message("user", other),))
    assert [a == b for a, b in zip(left, right, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize(
    "messages",
    [
        (Message("system", "x" * 600),),
        (Message("user", ""), Message("user", "x" * 600)),
    ],
)
def test_roles_and_borders_of_messages_count(messages: tuple[Message, ...]) -> None:
    same = prefix_of_messages((Message("user", "x" * 600),))
    assert prefix_of_messages(messages)[0] != same[0]


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(0, 0), (BLOCK_CHARS - 6 - 1, 0), (BLOCK_CHARS - 6, 1), (10_000_000, BLOCKS_MAX)],
)
def test_only_whole_blocks_up_to_the_bound(length: int, blocks: int) -> None:
    assert len(prefix_of_messages((Message("user", "x" * length),))) == blocks


def test_any_text_is_hashed() -> None:
    assert prefix_of_messages((Message("user", "\ud800" * 300),))


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(BLOCK_TOKENS - 1, 0), (BLOCK_TOKENS, 1), ((BLOCKS_MAX + 5) * BLOCK_TOKENS, BLOCKS_MAX)],
)
def test_token_ids_are_hashed_by_block(length: int, blocks: int) -> None:
    prefix = prefix_of_tokens(list(range(length)))
    assert len(prefix) == blocks
    assert prefix == prefix_of_tokens(list(range(length + 1)))[:blocks]


def test_hashes_fit_any_json_reader() -> None:
    assert all(0 <= block < 2**63 for block in prefix_of_messages(chat("x" * 9000)))


def test_a_request_is_hashed_by_its_messages() -> None:
    request = GenerationRequest("r", chat("hello"), model="m")
    assert prefix_of(request) == prefix_of_messages(chat("hello"))
    assert prompt_tokens_guess(request) == (1000 + 5) // 4 + 1


def test_an_index_tells_expected_from_held() -> None:
    index = PrefixIndex(100)
    index.expect((1, 2, 3))
    assert index.overlap((1, 2, 3, 4)) == (3, 0)
    index.hold((1, 2))
    assert index.overlap((1, 2, 3, 4)) == (3, 2)
    index.expect((1, 2))  # does not unlearn
    assert index.overlap((1, 2)) == (2, 2)
    assert index.overlap((9, 1)) == (0, 0)


def test_the_least_recently_used_leave_and_tails_before_heads() -> None:
    index = PrefixIndex(4)
    index.hold((1, 2, 3))
    index.hold((1, 2, 4))
    assert index.overlap((1, 2, 3)) == (3, 3)
    index.hold((5,))
    assert index.overlap((1, 2, 3)) == (2, 2)
    assert index.overlap((1, 2, 4)) == (3, 3)
    assert len(index) == 4


def test_an_index_that_believed_too_much_is_cut_and_grows_back() -> None:
    index = PrefixIndex(1000)
    index.learn(held_tokens=1000, cached_tokens=0)
    assert index.size_max == 900
    index.learn(held_tokens=1000, cached_tokens=990)
    assert index.size_max == 910
    for _ in range(100):
        index.learn(held_tokens=1000, cached_tokens=1000)
    assert index.size_max == 1000
    for _ in range(100):
        index.learn(held_tokens=10_000, cached_tokens=0)
    assert index.size_max == BLOCKS_MAX


def test_nothing_is_learned_from_what_was_not_believed() -> None:
    index = PrefixIndex(1000)
    index.learn(held_tokens=0, cached_tokens=0)
    index.learn(held_tokens=BLOCK_TOKENS, cached_tokens=0)  # within the engine's block size
    assert index.size_max == 1000

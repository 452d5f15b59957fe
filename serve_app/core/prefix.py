"""What of a prompt a replica is likely to hold in its KV cache: hashes of its first blocks.

Owns the hashes and one replica's bounded index of them. Knows no tokenizer: a chat is hashed as
text, because whoever asks the router (an executor, mostly) has none, and the template makes equal
beginnings of equal beginnings; a prompt that comes as token ids is hashed as ids. The two do not
match each other. The model is no part of a hash, as an index belongs to a replica, and a replica to
its model. Invariant: a block's hash covers all before it, so equal hashes mean equal
prefixes, and an index never holds more than `size_max` of them.

The index is a guess: the engine evicts when it likes. Each answer brings the engine's own count of
cached tokens, and an index that believed too much is cut (`PrefixIndex.learn`). vLLM's KV events
would say it sooner, but name blocks by hashes of token ids, which a hash of text cannot meet.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from serve_app.core.inference import GenerationRequest, Message

BLOCK_TOKENS = 64  # half of vLLM's CPU block, four of its GPU blocks
CHARS_PER_TOKEN = 4
BLOCK_CHARS = CHARS_PER_TOKEN * BLOCK_TOKENS
BLOCKS_MAX = 128  # of one prompt: 8 k tokens; what is longer differs late or not at all
_HASH_BYTES = 8


def prefix_of(request: GenerationRequest) -> tuple[int, ...]:
    """Hashes of a request's first whole blocks, at most `BLOCKS_MAX`; about 1 µs each."""
    if request.prompt_token_ids:
        return prefix_of_tokens(request.prompt_token_ids)
    return prefix_of_messages(request.messages)


def prompt_tokens_guess(request: GenerationRequest) -> int:
    """Prompt tokens of a request that nobody has tokenised; a rough rule for English."""
    if request.prompt_token_ids:
        return len(request.prompt_token_ids)
    return sum(len(message.content) for message in request.messages) // CHARS_PER_TOKEN + 1


def prefix_of_messages(messages: Iterable[Message]) -> tuple[int, ...]:
    """Hashes of a chat's text."""
    text = _beginning(messages, BLOCKS_MAX * BLOCK_CHARS)
    whole = len(text) - len(text) % BLOCK_CHARS
    blocks = (
        text[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass")
        for start in range(0, whole, BLOCK_CHARS)
    )
    return tuple(_chain(b"text", blocks))


def prefix_of_tokens(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Hashes of a prompt that is tokens already; ids fit into 32 bits."""
    count = min(len(token_ids) // BLOCK_TOKENS, BLOCKS_MAX)
    blocks = (
        b"".join(
            token_id.to_bytes(4, "big")
            for token_id in token_ids[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        )
        for index in range(count)
    )
    return tuple(_chain(b"ids", blocks))


class PrefixIndex:
    """The blocks that one replica is thought to hold, least recently used first.

    A block is expected from the moment a prompt with it is sent there, and held once the replica
    has computed it.
    """

    def __init__(self, size_max: int) -> None:
        self._limit = self.size_max = size_max
        self._blocks: OrderedDict[int, bool] = OrderedDict()  # whether it is held

    def __len__(self) -> int:
        return len(self._blocks)

    def overlap(self, prefix: Sequence[int]) -> tuple[int, int]:
        """How many leading blocks are expected, and how many of these are held."""
        held = 0
        for count, block in enumerate(prefix):
            is_held = self._blocks.get(block)
            if is_held is None:
                return count, held
            held += is_held and held == count
        return len(prefix), held

    def expect(self, prefix: Sequence[int]) -> None:
        """A prompt with these blocks is on its way; the last of them leave before the first."""
        for block in reversed(prefix):
            self._blocks.setdefault(block, False)
            self._blocks.move_to_end(block)
        self._trim()

    def hold(self, prefix: Sequence[int]) -> None:
        """The replica has computed these blocks."""
        for block in reversed(prefix):
            self._blocks[block] = True
            self._blocks.move_to_end(block)
        self._trim()

    def learn(self, held_tokens: int, cached_tokens: int) -> None:
        """Compare what was believed held with what the engine found.

        The blocks in question are held again, as the prompt that showed it was just computed; but
        where the engine had evicted them, it has evicted others too, so the index is cut by a
        tenth, and grows again slowly while it is right.
        """
        if cached_tokens < held_tokens * 3 // 4 - 2 * BLOCK_TOKENS:
            self.size_max = max(BLOCKS_MAX, self.size_max * 9 // 10)
            self._trim()
        elif held_tokens:
            self.size_max = min(self._limit, self.size_max + 1 + self.size_max // 100)

    def _trim(self) -> None:
        while len(self._blocks) > self.size_max:
            self._blocks.popitem(last=False)


def _beginning(messages: Iterable[Message], chars_max: int) -> str:
    parts: list[str] = []
    room = chars_max
    for message in messages:
        part = f"{message.role}\x1f{message.content[:room]}\x1e"
        parts.append(part)
        room -= len(part)
        if room <= 0:
            break
    return "".join(parts)[:chars_max]


def _chain(seed: bytes, blocks: Iterable[bytes]) -> Iterator[int]:
    state = hashlib.blake2b(seed, digest_size=_HASH_BYTES).digest()
    for block in blocks:
        state = hashlib.blake2b(state + block, digest_size=_HASH_BYTES).digest()
        yield int.from_bytes(state, "big") >> 1  # 63 bits: any JSON reader's integer

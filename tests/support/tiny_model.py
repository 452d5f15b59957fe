"""A random Llama of 0.85 M parameters with 512 tokens: an engine without a download.

It talks nonsense, but fast (thousands of tokens a second on a CPU), in float32 and with a fixed
seed, so that greedy answers repeat. For tests that need tokens rather than sense.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

END = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END, "<|pad|>")
VOCABULARY_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    path: Path, context_max: int = 512, seed: int = 20261121, *, is_embedding: bool = False
) -> Path:
    """Write config, weights and tokenizer into `path`, which is created; return it.

    Another seed makes another model. An embedding model is the same without its head.
    """
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_max,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
    )
    model: Any = (LlamaModel if is_embedding else LlamaForCausalLM)(config)
    model.to(torch.float32).save_pretrained(path)
    return path


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE: four special tokens, 256 bytes, and pairs of letters up to 512."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinshrdlucmfw"  # the commonest of English: 16 by 16 is enough pairs
    pairs = [(left, right) for left in letters for right in letters]
    pairs = pairs[: VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(alphabet)]
    words = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in pairs)]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=pairs)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=END,
        pad_token=SPECIAL_TOKENS[3],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    assert len(json.loads((path / "tokenizer.json").read_bytes())["model"]["vocab"]) == len(words)

"""Sampling parameters between vLLM's own class and the plain values that cross a link.

Owns both directions of one mapping: the ingress writes `GenerationRequest.engine_options`, the
replica reads them. Imports nothing of vLLM; its classes are handed in. Invariant: a parameter that
is neither in `GenerationRequest` nor in `OFFERED` is refused, never dropped in silence.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from serve_app.adapters.vllm_tool_grammar import lark_of
from serve_app.core.errors import InvalidPromptError
from serve_app.core.inference import JsonValue

ENGINE_LEVEL = ("cache_salt", "reasoning_ended", "reasoning_parser_kwargs")
OFFERED = (
    "allowed_token_ids",
    "bad_words",
    "extra_args",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprob_token_ids",
    "logprobs",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "prompt_logprobs",
    "repetition_detection",
    "repetition_penalty",
    "skip_reading_prefix_cache",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "top_k",
)
_REFUSED = ("prompt_logprob_token_ids", "trace_decode_token_ids", "watermarking")
_NESTED = ("repetition_detection", "structured_outputs")


class SamplingOptions:
    """Writes options; made once, from the defaults of vLLM's class.

    Args:
        defaults: a `SamplingParams()`.
    """

    def __init__(self, defaults: Any) -> None:
        self._defaults = {name: getattr(defaults, name) for name in OFFERED + _REFUSED}

    def of(self, params: Any) -> dict[str, JsonValue]:
        """What differs from the defaults, as plain values.

        Raises:
            InvalidPromptError: something that this service does not carry.
        """
        wanted: dict[str, JsonValue] = {}
        for name, default in self._defaults.items():
            value = getattr(params, name)
            if value is default or (type(value) is type(default) and value == default):
                continue
            if name in _REFUSED:
                raise InvalidPromptError(f"{name} is not offered here")
            wanted[name] = _plain(name, value)
        return wanted


def sampling_arguments(options: Mapping[str, JsonValue], classes: Any) -> dict[str, Any]:
    """Keyword arguments for `SamplingParams` from options.

    Args:
        options: `GenerationRequest.engine_options`; those that are no sampling are left out.
        classes: the module `vllm.sampling_params`.

    Raises:
        InvalidPromptError: an option that does not exist.
        ValueError, TypeError: vLLM's own refusals of a nested value.
    """
    makers: dict[str, Callable[[Any], Any]] = {
        "logit_bias": lambda pairs: {int(token): bias for token, bias in pairs.items()},
        "repetition_detection": lambda given: classes.RepetitionDetectionParams(**given),
        "structured_outputs": lambda given: classes.StructuredOutputsParams(**given),
    }
    arguments: dict[str, Any] = {}
    for name, value in options.items():
        if name in ENGINE_LEVEL:
            continue
        if name not in OFFERED:
            raise InvalidPromptError(f"{name} is not offered here")
        make = makers.get(name)
        arguments[name] = value if make is None else make(value)
    return arguments


def _plain(name: str, value: Any) -> JsonValue:
    if name in _NESTED:
        members = {one.name: getattr(value, one.name) for one in fields(value) if one.init}
        kept = {key: member for key, member in members.items() if member not in (None, False)}
        if (tag := kept.pop("structural_tag", None)) is not None:
            kept["grammar"] = lark_of(tag)
        return kept
    if name == "logit_bias":
        return {str(token): bias for token, bias in value.items()}  # msgpack keys are text
    plain: JsonValue = value
    return plain

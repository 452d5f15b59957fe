"""From a `GenerationRequest` to what vLLM's engine core takes: template, tokens, sampling, checks.

Owns the mapping and the words of its refusals. Runs nothing and holds no request. Invariant:
`PromptMaker.make` is pure but for its tokenizer, so it may run in a thread that has a tokenizer of
its own.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve_app.adapters.vllm_sampling import ENGINE_LEVEL, sampling_arguments
from serve_app.core.errors import InvalidPromptError, ModelNotAvailableError
from serve_app.core.inference import EMBEDDING, GenerationRequest

RESUME_IDS = "inferpipe_resume_ids"  # in `SamplingParams.extra_args`; vllm_scheduler reads it
TASKS = ("generate",)  # what the engine is asked for; process_inputs wants to be told
EMBED = "embed"


class PromptMaker:
    """Makes engine-core requests for one engine.

    Args:
        llm: the `AsyncLLM`; its input processor and classes are used, its loop is not.
        served_names: the ids of the only model there is.
        vllm: the imported package, handed in because only the engine adapter imports it.
    """

    def __init__(self, llm: Any, served_names: tuple[str, ...], vllm: Any) -> None:
        self._inputs = llm.input_processor
        self._served_names = served_names
        self._vllm = vllm
        self.context_max: int = llm.model_config.max_model_len
        self.is_pooling: bool = llm.model_config.runner_type == "pooling"
        self._chars_max = self.context_max * int(llm.get_tokenizer().max_chars_per_token)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what needs no tokenizer to be refused.

        Raises:
            ModelNotAvailableError: another model's name.
            InvalidPromptError: nothing was said, or far too much.
        """
        if request.model and request.model not in self._served_names:
            names = ", ".join(self._served_names)
            raise ModelNotAvailableError(f"no model {request.model!r} here; available: {names}")
        if request.is_embedding is not self.is_pooling:
            gives, asked = ("embeddings", "text") if self.is_pooling else ("text", "embeddings")
            name = request.model or self._served_names[0]
            raise ModelNotAvailableError(f"the model {name} gives {gives}, not {asked}")
        for name, number in (("seed", request.seed or 0), ("priority", request.priority)):
            # Found out later, the number would break the message to the engine's process.
            if not -(2**63) <= number < 2**63:
                raise InvalidPromptError(f"{name} must fit into 64 bits")
        if len(request.prompt_token_ids) >= self.context_max + self.is_pooling:
            raise InvalidPromptError(self._too_long(len(request.prompt_token_ids)))
        size = chars_of(request)
        if size == 0 and not request.prompt_token_ids:
            raise InvalidPromptError("the prompt is empty")
        # No token is longer than the longest of the vocabulary, so that a huge text is refused
        # without a second of tokenising (vLLM's own renderer does the same).
        if size > self._chars_max:
            raise InvalidPromptError(
                f"the prompt of {size} characters is too long for the model's limit of "
                f"{self.context_max} tokens"
            )

    def make(self, request: GenerationRequest, tokenizer: Any) -> Any:
        """The `EngineCoreRequest`.

        Raises:
            InvalidPromptError: the template, the limit, vLLM's checks or the grammar say no.
        """
        token_ids = list(request.prompt_token_ids) or self._token_ids(request, tokenizer)
        room = self.context_max - len(token_ids)
        if room < (0 if self.is_pooling else 1 + len(request.resume_ids)):
            raise InvalidPromptError(self._too_long(len(token_ids)))
        options = request.engine_options
        try:
            prompt = self._vllm.inputs.tokens_input(token_ids, cache_salt=options.get("cache_salt"))
            made = self._inputs.process_inputs(
                request.request_id,
                prompt,
                self._pooling(request) if self.is_pooling else self._sampling(request, room),
                supported_tasks=(EMBED,) if self.is_pooling else TASKS,
                priority=request.priority,
            )
        # vLLM raises both its own class and plain ValueErrors for what it refuses.
        except (self._vllm.exceptions.VLLMClientError, ValueError, TypeError) as error:
            raise InvalidPromptError(f"the engine refuses the request: {error}") from error
        self._inputs.assign_request_id(made)
        for name in ENGINE_LEVEL[1:]:
            if name in options:
                setattr(made, name, options[name])
        return made

    def continued(self, made: Any, resume_ids: Sequence[int]) -> Any:
        """What the engine's core takes of a request whose first tokens were made elsewhere.

        The front end keeps `made`, as if the tokens had come from its own core.
        """
        count = len(resume_ids)
        core = copy.copy(made)
        core.prompt_token_ids = [*made.prompt_token_ids, *resume_ids]
        sampling = made.sampling_params.clone()
        sampling.max_tokens -= count
        sampling.min_tokens = max(0, sampling.min_tokens - count)
        sampling.extra_args = {**(sampling.extra_args or {}), RESUME_IDS: list(resume_ids)}
        core.sampling_params = sampling
        return core

    def _too_long(self, token_count: int) -> str:
        return (
            f"the prompt has {token_count} tokens; the model's limit is {self.context_max} tokens "
            "for prompt and answer together"
        )

    def _token_ids(self, request: GenerationRequest, tokenizer: Any) -> list[int]:
        if self.is_pooling:
            text = "\n".join(message.content for message in request.messages)
            return list(tokenizer.encode(text))
        messages = [
            {"role": message.role, "content": message.content} for message in request.messages
        ]
        try:
            token_ids: list[int] = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        # The template is the model's code: roles it does not know end in any kind of error.
        except Exception as error:
            raise InvalidPromptError(
                f"the model's chat template refuses the messages: {error}"
            ) from error
        return token_ids

    def _pooling(self, request: GenerationRequest) -> Any:
        given = request.engine_options[EMBEDDING]
        assert isinstance(given, Mapping), "see `GenerationRequest`"
        params = self._vllm.PoolingParams(task=EMBED, **given)
        params.verify(self._inputs.model_config)
        return params

    def _sampling(self, request: GenerationRequest, room: int) -> Any:
        classes = self._vllm.sampling_params
        further = sampling_arguments(request.engine_options, classes)
        further.setdefault("structured_outputs", self._grammar(request))
        if request.resume_ids:
            further.pop("prompt_logprobs", None)  # they were told with the first tokens
        return self._vllm.SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
            stop=list(request.stop),
            seed=request.seed,
            output_kind=classes.RequestOutputKind.DELTA,
            **further,
        )

    def _grammar(self, request: GenerationRequest) -> Any:
        if request.output_schema is None:
            return None
        make: Callable[..., Any] = self._vllm.sampling_params.StructuredOutputsParams
        if not request.output_schema:
            return make(json_object=True)  # an empty mapping would read as "no schema" there
        return make(json=dict(request.output_schema))


def chars_of(request: GenerationRequest) -> int:
    """Characters of all messages."""
    return sum(len(message.content) for message in request.messages)

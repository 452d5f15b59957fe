"""`OpenAiServing` that costs nothing until a model is there to be asked.

Owns when vLLM's serving code is imported (6 s, 0.5 GB of memory, in a thread: the event loop is
held up for 0.3 s at most) and which model a call is for. Invariant: no call waits longer than
`LOAD_WAIT_S` for the import.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from serve_app.adapters.collector import set_aside_what_stays
from serve_app.core.errors import ModelNotAvailableError, OverloadedError, ServeAppError
from serve_app.ports import Clock, Entropy, Generate, OpenAiAnswer, OpenAiCall, OpenAiModel

if TYPE_CHECKING:
    from serve_app.adapters.vllm_openai import VllmOpenAi

LOAD_WAIT_S = 30.0  # of one call; clients try again after a 503
LOOK_S = 1.0  # how often the fleet is asked whether a model is ready

logger = logging.getLogger(__name__)


class LazyOpenAi:
    """See `ports.OpenAiServing`.

    Args:
        has_model: whether a replica is ready; until then the import would only slow its start.
    """

    def __init__(
        self,
        models: tuple[OpenAiModel, ...],
        generate: Generate,
        has_model: Callable[[], bool],
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._models = models
        self._generate = generate
        self._has_model = has_model
        self._clock = clock
        self._entropy = entropy
        self._is_wanted = False
        self._loaded = asyncio.Event()
        self._serving: dict[str, VllmOpenAi] = {}

    @property
    def models(self) -> tuple[OpenAiModel, ...]:
        """See `ports.OpenAiServing`."""
        return self._models

    async def run(self) -> None:
        """Import once a model or a caller is there; then rest until cancelled."""
        while not self._is_wanted and not self._has_model():
            await self._clock.sleep(LOOK_S)
        started_s = self._clock.monotonic_s()
        try:
            self._serving = await asyncio.to_thread(self._load)
        except Exception:  # the other surfaces go on; calls to this one are told
            logger.exception("the serving code of OpenAI's API does not load")
        else:
            set_aside_what_stays()
            took_s = round(self._clock.monotonic_s() - started_s, 1)
            logger.info("the serving code of OpenAI's API is loaded", extra={"took_s": took_s})
        self._models = tuple(
            replace(model, context_max=self._serving[model.names[0]].context_max)
            for model in self._models
            if model.names[0] in self._serving
        )
        self._loaded.set()
        await asyncio.Event().wait()

    async def answer(self, kind: str, body: object, call: OpenAiCall) -> OpenAiAnswer:
        """See `ports.OpenAiServing`."""
        name = self._name(body)
        if not self._loaded.is_set():
            self._is_wanted = True
            try:
                async with asyncio.timeout(LOAD_WAIT_S):
                    await self._loaded.wait()
            except TimeoutError as error:
                raise OverloadedError("this surface is starting; try again soon") from error
        serving = self._serving.get(name)
        if serving is None:
            raise ServeAppError("this surface could not start; the log of the ingress says why")
        return await serving.answer(kind, body, call)

    def _name(self, body: object) -> str:
        """The first name of the model that a body is for; vLLM refuses a body that is no object."""
        wanted = body.get("model") if isinstance(body, dict) else None
        for model in self._models:
            if not wanted or wanted in model.names:
                return model.names[0]
        names = ", ".join(name for model in self._models for name in model.names)
        raise ModelNotAvailableError(f"The model `{wanted}` does not exist. Available: {names}.")

    def _load(self) -> "dict[str, VllmOpenAi]":
        environment = os.environ  # noqa: TID251 - vLLM has no argument for these
        environment["VLLM_NO_USAGE_STATS"] = "1"  # nothing is reported to anyone
        environment["VLLM_CONFIGURE_LOGGING"] = "0"  # its lines go where ours go
        from serve_app.adapters.vllm_openai import VllmOpenAi  # noqa: PLC0415 - see the module

        return {
            model.names[0]: VllmOpenAi(model, self._generate, self._entropy)
            for model in self._models
        }

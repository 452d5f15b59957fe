"""vLLM's scheduler with one addition: a grammar that starts behind tokens made elsewhere.

Imported by name in vLLM's engine process, never in ours. A request that goes on with an answer
begun at another replica carries those tokens at the end of its prompt, where vLLM's grammar does
not look: it would begin a second JSON document inside the first. So each grammar is moved over them
as soon as it is compiled. Invariant: a grammar that refuses those tokens fails its request; it
never generates from a wrong place.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from serve_app.adapters.parent_process import end_with_parent
from serve_app.adapters.vllm_prompt import RESUME_IDS


def scheduler(**arguments: Any) -> Scheduler:
    """The scheduler that vLLM itself would take, over a manager that advances grammars.

    vLLM makes it once, in the engine's process: the place to tie that process to the replica's.
    """
    end_with_parent()
    _advance_grammars(arguments["structured_output_manager"])
    is_async = arguments["vllm_config"].scheduler_config.async_scheduling
    return (AsyncScheduler if is_async else Scheduler)(**arguments)


def _advance_grammars(manager: Any) -> None:
    compile_grammar = manager._create_grammar  # noqa: SLF001 - there is no public place

    def create(request: Any) -> Any:
        grammar = compile_grammar(request)
        resume_ids = (request.sampling_params.extra_args or {}).get(RESUME_IDS)
        if resume_ids and not grammar.accept_tokens(request.request_id, list(resume_ids)):
            raise ValueError("the grammar refuses the tokens of the answer so far")
        return grammar

    manager._create_grammar = create  # noqa: SLF001

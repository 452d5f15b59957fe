"""The first generation of a new engine: only what has made a token is called ready.

Owns that one request. An engine can load, listen and answer health checks and yet fail at its
first step (a kernel that does not fit the machine, a broken tokenizer). Invariant: it returns only
after a whole answer has come, and raises within `TIMEOUT_S`.
"""

import asyncio

from serve_app.core.errors import ConnectionFailedError
from serve_app.core.inference import EMBEDDING, Chunk, GenerationRequest, Message
from serve_app.ports import InferenceEngine

TIMEOUT_S = 120.0  # the first step may compile
TOKENS = 2  # the first comes from prefill, the second from decoding


async def sing(engine: InferenceEngine, *, is_embedding: bool = False) -> int:
    """Have the engine make a few tokens, or an embedding; how many tokens it made.

    Raises:
        ConnectionFailedError: nothing came in time.
        ServeAppError: what the engine answered.
    """
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    token_count = 0

    def emit(output: Chunk | Exception) -> None:
        nonlocal token_count
        if done.done():
            return
        if isinstance(output, Exception):
            done.set_exception(output)
            return
        token_count += len(output.token_ids)
        if output.finish_reason is not None:
            done.set_result(token_count)

    request = GenerationRequest(
        "canary",
        (Message("user", "Say hello."),),
        max_tokens=TOKENS,
        temperature=0.0,
        engine_options={EMBEDDING: {}} if is_embedding else {},
    )
    engine.submit(request, emit)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await done
    except TimeoutError as error:
        engine.abort(request.request_id)
        raise ConnectionFailedError("the engine made no token") from error

"""The first generation of an engine: a token, or words why not."""

import pytest

from serve_app.core.errors import ConnectionFailedError, ServeAppError
from serve_app.services.canary import TOKENS, sing
from tests.support.scripted_engine import ScriptedEngine
from tests.support.virtual_time import virtual_time


@virtual_time
async def test_an_engine_that_generates_is_ready() -> None:
    engine = ScriptedEngine()
    assert await sing(engine) == TOKENS
    assert engine.running == ()


@virtual_time
async def test_an_engine_that_fails_at_its_first_step_is_not() -> None:
    engine = ScriptedEngine(errors={"canary": (0, ServeAppError("no such kernel"))})
    with pytest.raises(ServeAppError, match="no such kernel"):
        await sing(engine)


@virtual_time
async def test_an_engine_that_hangs_is_given_up_and_the_request_with_it() -> None:
    engine = ScriptedEngine(is_manual=True)
    with pytest.raises(ConnectionFailedError, match="no token"):
        await sing(engine)
    assert engine.aborted == ["canary"]

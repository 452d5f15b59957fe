"""Requests to a router over a real link: the answers, the errors, and nobody waiting for nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from serve_app.adapters import tcp_admission
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_admission import AdmissionLink, AdmissionServer
from serve_app.adapters.tcp_link_peers import Address, CallingLink
from serve_app.adapters.tcp_link_wire import VERSION, pack_frame, proof
from serve_app.core.errors import (
    ConnectionFailedError,
    InvalidRequestError,
    NoHostsAvailableError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.inference import AdmitRequest, Grant, Placement
from tests.support.link_pair import LINK, SECRET

FULL = AdmitRequest(
    request_id="r1",
    model="acme/tiny",
    token_count=120,
    excluded=("a", "b"),
    prompt_tokens=20,
    prefix=(2**63, 7),
    tenant="acme",
    session="s",
    priority=-3,
    deadline_ms=1_700_000_000_000,
    placement=Placement("h1", 250, "1.5", "eu"),
    is_resumed=True,
)
GRANT = Grant("r1", "replica-1", "127.0.0.1", 5, 6, "signature")


@dataclass
class Desk:
    """Answers as it is told, and notes who asks and who leaves."""

    answer: Grant | Exception | None = GRANT  # None: whoever asks waits
    asked: list[AdmitRequest] = field(default_factory=list)
    left: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    async def admit(self, request: AdmitRequest) -> Grant:
        self.asked.append(request)
        try:
            while self.answer is None:
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.left.put_nowait(request.request_id)
            raise
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass
class Ends:
    desk: Desk
    server: AdmissionServer
    link: AdmissionLink
    address: Address

    def ask(self, request: AdmitRequest = FULL) -> asyncio.Task[Grant]:
        return asyncio.create_task(self.link.admit(self.address, request))

    async def asked(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.desk.asked) < count:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def both(desk: Desk, *, secret: bytes = SECRET, asked_max: int = 8) -> AsyncIterator[Ends]:
    clock, entropy = SystemClock(), SystemEntropy()
    server = AdmissionServer(desk.admit, SECRET, clock, entropy, asked_max=asked_max, settings=LINK)
    await server.start()
    link = AdmissionLink(secret, clock, entropy, LINK)
    try:
        yield Ends(desk, server, link, server.address)
    finally:
        await link.close()
        await server.close()


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    async with both(Desk()) as ends:
        yield ends


async def test_a_request_arrives_whole_and_its_grant_comes_back(ends: Ends) -> None:
    assert await ends.ask() == GRANT
    assert await ends.ask(AdmitRequest("r2", "m", 1)) == GRANT
    assert ends.desk.asked == [FULL, AdmitRequest("r2", "m", 1)]


@pytest.mark.parametrize("error", [OverloadedError("full"), NoHostsAvailableError("none")])
async def test_a_refusal_keeps_its_class_and_words(ends: Ends, error: ServeAppError) -> None:
    ends.desk.answer = error
    with pytest.raises(type(error), match=str(error)):
        await ends.ask()


async def test_an_unforeseen_error_reaches_its_caller_alone(ends: Ends) -> None:
    ends.desk.answer = ZeroDivisionError("secret words")
    with pytest.raises(ServeAppError, match="the router failed"):
        await ends.ask()
    ends.desk.answer = GRANT
    assert await ends.ask() == GRANT


async def test_who_is_cancelled_no_longer_waits(ends: Ends) -> None:
    ends.desk.answer = None
    first, second = ends.ask(), ends.ask(replace(FULL, request_id="r2"))
    await ends.asked(2)
    first.cancel()
    async with asyncio.timeout(5):
        assert await ends.desk.left.get() == "r1"
    ends.desk.answer = GRANT
    assert await second == GRANT
    assert ends.desk.left.empty()


async def test_who_is_cancelled_at_once_leaves_nothing(ends: Ends) -> None:
    assert await ends.ask() == GRANT
    ends.desk.answer = None
    for number in range(20):  # more than the bound: each is asked and cancelled in one frame
        hasty = ends.ask(replace(FULL, request_id=f"h{number}"))
        await asyncio.sleep(0)
        hasty.cancel()
        await asyncio.gather(hasty, return_exceptions=True)
        ends.desk.left = asyncio.Queue()
    ends.desk.answer = GRANT
    assert await ends.ask() == GRANT
    assert len(ends.desk.asked) == 2


async def test_who_breaks_off_no_longer_waits(ends: Ends) -> None:
    ends.desk.answer = None
    waiting = ends.ask()
    await ends.asked(1)
    await ends.link.close()
    with pytest.raises(ConnectionFailedError):
        await waiting
    async with asyncio.timeout(5):
        assert await ends.desk.left.get() == "r1"


async def test_who_falls_silent_no_longer_waits(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CallingLink, "_ping_now", lambda _self: None)
    ends.desk.answer = None
    waiting = ends.ask()
    async with asyncio.timeout(5):
        assert await ends.desk.left.get() == "r1"
        with pytest.raises(ConnectionFailedError):
            await waiting


async def test_a_router_that_goes_is_told_to_its_callers_at_once(ends: Ends) -> None:
    ends.desk.answer = None
    waiting = ends.ask()
    await ends.asked(1)
    await ends.server.close()
    async with asyncio.timeout(2):
        with pytest.raises(ConnectionFailedError):
            await waiting
        with pytest.raises(ConnectionFailedError):  # and nobody listens there any more
            await ends.ask()


async def test_a_grant_of_another_layout_leaves_nobody_waiting(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tcp_admission.astuple
    monkeypatch.setattr(
        tcp_admission, "astuple", lambda value: [1] if value == GRANT else whole(value)
    )
    async with asyncio.timeout(2):
        with pytest.raises(ConnectionFailedError, match="another layout"):
            await ends.ask()


async def test_one_connection_has_a_bound(ends: Ends) -> None:
    ends.desk.answer = None
    waiting = [ends.ask(replace(FULL, request_id=f"r{n}")) for n in range(8)]
    await ends.asked(8)
    with pytest.raises(OverloadedError, match="try again later"):
        await ends.ask(replace(FULL, request_id="r9"))
    ends.desk.answer = GRANT
    assert await asyncio.gather(*waiting) == [GRANT] * 8
    assert await ends.ask() == GRANT


async def test_a_request_that_no_frame_can_carry_is_refused(ends: Ends) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        await ends.ask(replace(FULL, session="\ud800"))
    assert await ends.ask() == GRANT


async def test_who_does_not_know_the_secret_asks_nothing() -> None:
    async with both(Desk(), secret=b"guess") as ends:
        with pytest.raises(ConnectionFailedError):
            await ends.ask()
        assert ends.desk.asked == []
        assert not ends.server.connections


@pytest.mark.parametrize(
    "item", [[3, 1, ["r1"]], [3, "x", []], [9, 1], [3, 1, [None] * 12], ["?"], 7, []]
)
async def test_a_client_that_breaks_the_rules_is_cut_off(ends: Ends, item: object) -> None:
    reader, writer = await asyncio.open_connection(*ends.address)
    async with asyncio.timeout(5):
        hello = await reader.read(1000)
        nonce = hello[-22:] if len(hello) > 22 else hello
        claim = proof(SECRET, b"client", nonce, b"mine")
        writer.write(pack_frame([VERSION, b"mine", claim]) + pack_frame([item]))
        while await reader.read(1000):
            pass
    writer.close()
    assert ends.desk.asked == []
    assert await ends.ask() == GRANT

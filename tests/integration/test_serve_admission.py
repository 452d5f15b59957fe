"""Which router is asked, under which name, and what a lost router costs: nothing."""

import asyncio
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.adapters.tcp_admission import AdmissionLink, AdmissionServer
from serve_app.adapters.tcp_link_peers import Address
from serve_app.core.errors import NoHostsAvailableError
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.settings import Settings
from tests.support.link_pair import LINK, SECRET

with warnings.catch_warnings():  # Ray's own, at its import
    warnings.simplefilter("ignore")
    from ray.exceptions import ActorDiedError

    from serve_app.adapters import serve_admission

if TYPE_CHECKING:
    from serve_app.adapters.serve_admission import ServeAdmission

TWO = [{"name": "small", "path": "/s", "aliases": ["gpt-small"]}, {"name": "org/large"}]


class HandClock(SystemClock):
    """Goes on by itself, and further when told to."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


@dataclass
class Routers:
    """Routers at real sockets, each found by its session as Serve would find it."""

    asked: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    servers: dict[str, AdmissionServer] = field(default_factory=dict)
    addresses: dict[str, Address] = field(default_factory=dict)
    searches: int = 0
    lost_count: int = 0  # calls of a handle that find a router dead

    async def start(self, session: str) -> None:
        async def admit(request: AdmitRequest) -> Grant:
            self.asked[session].append(request.model)
            return Grant(request.request_id, "r", "127.0.0.1", 1, 2, "")

        server = AdmissionServer(
            admit, SECRET, SystemClock(), SystemEntropy(), asked_max=8, settings=LINK
        )
        await server.start()
        self.addresses[session] = server.address
        self.servers[session] = server

    def options(self, *, session_id: str) -> "Handle":
        return Handle(self, session_id)


@dataclass
class Handle:
    """As much of Serve's as is used."""

    routers: Routers
    session: str

    @property
    def address(self) -> "Handle":
        return self

    async def remote(self) -> Address:
        self.routers.searches += 1
        if self.routers.lost_count:
            self.routers.lost_count -= 1
            raise ActorDiedError
        return self.routers.addresses[self.session]


@pytest.fixture
async def routers() -> AsyncIterator[Routers]:
    routers = Routers()
    for session in ("small", "org/large"):
        await routers.start(session)
    yield routers
    for server in routers.servers.values():
        await server.close()


@pytest.fixture
async def admission(routers: Routers) -> AsyncIterator["ServeAdmission"]:
    link = AdmissionLink(SECRET, SystemClock(), SystemEntropy(), LINK)
    handle: Any = routers
    admission = serve_admission.ServeAdmission(
        handle, Settings(models=TWO).own_names, link, SystemClock()
    )
    yield admission
    await admission.close()


async def test_a_model_has_one_queue_by_whichever_name_it_is_asked_for(
    routers: Routers, admission: "ServeAdmission"
) -> None:
    for name in ("", "gpt-small", "small", "org/large", "nobody"):
        await admission.admit(AdmitRequest("r", name, 1))
    assert routers.asked == {"small": ["small"] * 3 + ["nobody"], "org/large": ["org/large"]}
    assert routers.searches == 2  # one for each router, not for each request


async def test_many_at_once_look_for_the_router_once(
    routers: Routers, admission: "ServeAdmission"
) -> None:
    await asyncio.gather(*(admission.admit(AdmitRequest(f"r{n}", "", 1)) for n in range(8)))
    assert (routers.searches, len(routers.asked["small"])) == (1, 8)


async def test_a_router_that_was_replaced_is_found_again(
    routers: Routers, admission: "ServeAdmission"
) -> None:
    await admission.admit(AdmitRequest("r1", "", 1))
    await routers.servers["small"].close()
    await routers.start("small")
    routers.lost_count = 1  # the handle too hears late that it is gone
    await admission.admit(AdmitRequest("r2", "", 1))
    assert routers.asked["small"] == ["small", "small"]


async def test_a_router_that_stays_away_is_a_refusal(
    routers: Routers, admission: "ServeAdmission"
) -> None:
    await routers.servers["small"].close()
    with pytest.raises(NoHostsAvailableError, match="cannot be reached"):
        await admission.admit(AdmitRequest("r1", "", 1))


async def test_no_router_in_time_is_a_refusal(
    routers: Routers, admission: "ServeAdmission", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_admission, "FIND_WITHIN_S", 0.05)
    monkeypatch.setattr(serve_admission, "TRY_AGAIN_S", 0.01)
    routers.lost_count = 1000
    with pytest.raises(NoHostsAvailableError, match="cannot be reached"):
        await admission.admit(AdmitRequest("r1", "", 1))


async def test_a_place_known_for_long_is_looked_up_beside_the_request(routers: Routers) -> None:
    clock = HandClock()
    link = AdmissionLink(SECRET, SystemClock(), SystemEntropy(), LINK)
    handle: Any = routers
    admission = serve_admission.ServeAdmission(handle, Settings(models=TWO).own_names, link, clock)
    await admission.admit(AdmitRequest("r1", "", 1))
    await routers.start("other")
    routers.addresses["small"] = routers.addresses["other"]  # the queue has moved
    await admission.admit(AdmitRequest("r2", "", 1))
    clock.ahead_s = serve_admission.LOOK_AGAIN_S + 1
    await admission.admit(AdmitRequest("r3", "", 1))  # not held up: it goes where it is known
    async with asyncio.timeout(5):
        while routers.searches < 2:
            await asyncio.sleep(0.005)
    await admission.admit(AdmitRequest("r4", "", 1))
    assert (len(routers.asked["small"]), len(routers.asked["other"])) == (3, 1)
    await admission.close()

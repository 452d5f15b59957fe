"""Admission at the router that queues for a model: found by a Serve handle, asked over a link.

Owns which router that is. A call through a handle costs milliseconds, so it only finds the router;
the requests go over `tcp_admission`. Invariant: a router that was lost is asked for once more, at
the place where it is then, before a request is refused.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.adapters.tcp_admission import AdmissionLink
from serve_app.adapters.tcp_link_peers import Address
from serve_app.core.errors import ConnectionFailedError, NoHostsAvailableError, OverloadedError
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.core.routing import Decision
from serve_app.ports import Clock

# What answers cannot be told from a handle's type, so the calls below say what they expect.
Handle: TypeAlias = DeploymentHandle[Any]

FIND_WITHIN_S = 10.0
TRY_AGAIN_S = 0.1
LOOK_AGAIN_S = 5.0  # with more routers or fewer, a model's queue is elsewhere


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    address: Address
    found_at_s: float


class ServeAdmission:
    """See `ports.Admission`.

    Args:
        own_names: by each id of each model, its own; the default model's first. A model has one
            queue, by whichever id it is asked for.
    """

    def __init__(
        self, handle: Handle, own_names: Mapping[str, str], link: AdmissionLink, clock: Clock
    ) -> None:
        self._handle = handle
        self._own_names = own_names
        self._default_model = next(iter(own_names), "")
        self._link = link
        self._clock = clock
        self._handles: dict[str, Handle] = {}
        self._places: dict[str, _Place] = {}
        self._searches: dict[str, asyncio.Task[Address]] = {}

    async def admit(self, request: AdmitRequest) -> Grant:
        """Ask the model's router; a caller that is cancelled no longer waits there."""
        model = request.model or self._default_model
        request = replace(request, model=self._own_names.get(model, model))
        # Any router can say that it knows no such model.
        queue = self._own_names.get(model, self._default_model)
        address = await self._address(queue)
        try:
            return await self._link.admit(address, request)
        except ConnectionFailedError:
            self._forget(queue, address)
        address = await self._address(queue)
        try:
            return await self._link.admit(address, request)
        except ConnectionFailedError as error:
            raise NoHostsAvailableError("the router cannot be reached") from error

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        """Ask the router why."""
        with _router_errors():
            handle = self._handle_of(self._default_model)
            decisions: tuple[Decision, ...] = await handle.decisions.remote(limit)
        return decisions

    async def close(self) -> None:
        """End the searches and the links."""
        searches = tuple(self._searches.values())
        for search in searches:
            search.cancel()
        await asyncio.gather(*searches, return_exceptions=True)
        await self._link.close()

    async def _address(self, queue: str) -> Address:
        """Where the router of a queue is; one known for long is looked for again meanwhile."""
        place = self._places.get(queue)
        if place is not None and self._clock.monotonic_s() - place.found_at_s < LOOK_AGAIN_S:
            return place.address
        search = self._searches.get(queue)
        if search is None:
            # A task of its own, because many wait for it and any of them may be cancelled.
            search = asyncio.create_task(self._search(queue))  # noqa: TID251
            self._searches[queue] = search
            search.add_done_callback(_note)
        return await asyncio.shield(search) if place is None else place.address

    async def _search(self, queue: str) -> Address:
        try:
            async with asyncio.timeout(FIND_WITHIN_S):
                while True:
                    try:
                        address: Address = await self._handle_of(queue).address.remote()
                    except (RayError, DeploymentUnavailableError):
                        await self._clock.sleep(TRY_AGAIN_S)  # it is being replaced
                    else:
                        self._places[queue] = _Place(address, self._clock.monotonic_s())
                        return address
        except TimeoutError as error:
            raise NoHostsAvailableError("the router cannot be reached") from error
        finally:
            del self._searches[queue]

    def _forget(self, queue: str, address: Address) -> None:
        place = self._places.get(queue)
        if place is not None and place.address == address:
            del self._places[queue]

    def _handle_of(self, queue: str) -> Handle:
        """A handle whose calls all reach the same router; see `main.one_router_per_model`."""
        if queue not in self._handles:
            self._handles[queue] = self._handle.options(session_id=queue)
        return self._handles[queue]


def _note(search: "asyncio.Task[Address]") -> None:
    if not search.cancelled() and (error := search.exception()) is not None:
        logger.warning("no router found", extra={"error": str(error)})


@contextmanager
def _router_errors() -> Iterator[None]:
    try:
        yield
    except BackPressureError as error:
        raise OverloadedError("the router has too many requests; try again later") from error
    except (RayError, DeploymentUnavailableError) as error:
        raise NoHostsAvailableError("the router cannot be reached") from error

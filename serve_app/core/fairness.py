"""Who is served next when there is more work than room, and how much a tenant may have at all.

Owns the queue of one model and the tenants' token budgets. Knows no clock and awaits nothing.

The queue serves the tenant that has had the fewest tokens, counted in what the work costs: prompt
tokens that no cache holds, and tokens to generate. That is deficit round robin with the quantum
taken to nothing (Shreedhar and Varghese, SIGCOMM 1995), in the form of the virtual token counter
(Sheng and others, "Fairness in Serving Large Language Models", OSDI 2024): a heavy tenant waits for
its own earlier requests, not the light ones for it. A tenant that was idle starts at the floor, the
count of whoever was served last, so that nobody saves up. Costs are estimates until a replica
reports what was spent; the difference is put right then. Priority orders one tenant's own requests
and gives it no advantage over others. Invariant: queue and books are bounded, and every request
leaves the queue by `pop` or `remove`, once.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.core.errors import OverloadedError, RateLimitExceededError
from serve_app.core.inference import AdmitRequest
from serve_app.core.limits import Standing

TENANTS_MAX = 10_000  # whose counts are remembered while they are idle
MINUTE_MS = 60_000


@dataclass(order=True, frozen=True, slots=True)
class _Place:
    priority: int
    number: int
    request: AdmitRequest = field(compare=False)
    cost: int = field(compare=False)


class FairQueue:
    """The requests that wait for one model.

    Args:
        size_max: requests of all tenants together.
        tenant_size_max: of one tenant.
    """

    def __init__(self, size_max: int, tenant_size_max: int) -> None:
        self._size_max = size_max
        self._tenant_size_max = tenant_size_max
        self._waiting: dict[str, list[_Place]] = {}
        self._had: OrderedDict[str, float] = OrderedDict()  # tokens, by tenant
        self._floor = 0.0
        self._size = 0
        self._number = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: AdmitRequest, cost: int) -> None:
        """Have a request wait; `cost` is in tokens.

        Raises:
            RateLimitExceededError: its tenant has too many waiting.
            OverloadedError: all together have.
        """
        places = self._waiting.get(request.tenant, [])
        if len(places) >= self._tenant_size_max:
            raise RateLimitExceededError("too many requests of this workspace are waiting")
        if self._size >= self._size_max:
            raise OverloadedError("too many requests are waiting")
        if not places:
            self._enter(request.tenant)
            self._waiting[request.tenant] = places
        self._number += 1
        self._size += 1
        place = _Place(request.priority, self._number, request, max(1, cost))
        # Mostly the last: searched from there, and a sorted list is all a bounded queue needs.
        at = len(places)
        while at and place < places[at - 1]:
            at -= 1
        places.insert(at, place)

    def pop(self, can_run: Callable[[AdmitRequest], bool]) -> AdmitRequest | None:
        """Take the next request that can run now, and charge its tenant.

        A tenant whose first request cannot run is passed over, and none of its later ones overtakes
        it.
        """
        for tenant in sorted(self._waiting, key=self._rank):
            place = self._waiting[tenant][0]
            if can_run(place.request):
                self._leave(tenant, 0)
                self._serve(tenant, place.cost)
                return place.request
        return None

    def remove(self, request: AdmitRequest) -> None:
        """Forget a request that no longer waits; unknown ones are ignored."""
        places = self._waiting.get(request.tenant, [])
        for index, place in enumerate(places):
            if place.request.request_id == request.request_id:
                self._leave(request.tenant, index)
                return

    def charge(self, tenant: str, tokens: int) -> None:
        """Count work that did not have to wait."""
        self._enter(tenant)
        self._serve(tenant, tokens)

    def settle(self, tenant: str, tokens: int) -> None:
        """Put a charge right by what was really spent; fewer than 0: less than was thought."""
        if tenant in self._had:
            self._had[tenant] += tokens

    def _enter(self, tenant: str) -> None:
        self._had[tenant] = max(self._had.pop(tenant, 0.0), self._floor)
        if len(self._had) > TENANTS_MAX:
            idle = next((one for one in self._had if one not in self._waiting), tenant)
            if idle != tenant:  # the longest idle one, most likely below the floor anyhow
                del self._had[idle]

    def _serve(self, tenant: str, cost: int) -> None:
        self._floor = max(self._floor, self._had[tenant])
        self._had[tenant] += cost

    def _leave(self, tenant: str, index: int) -> None:
        places = self._waiting[tenant]
        del places[index]
        self._size -= 1
        if not places:
            del self._waiting[tenant]

    def _rank(self, tenant: str) -> tuple[float, int]:
        return self._had[tenant], self._waiting[tenant][0].number


class TokenBudgets:
    """Tokens that each tenant may use in a minute: a bucket each, refilled evenly.

    Args:
        per_minute: the size of a bucket; 0: no budget.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._levels: OrderedDict[str, tuple[float, int]] = OrderedDict()  # tokens, at ms

    def reserve(self, tenant: str, tokens: int, now_ms: int) -> None:
        """Take what a request may use; more than a whole bucket needs a full one.

        Raises:
            RateLimitExceededError: it is not there; the error says when it will be.
        """
        if not self._per_minute:
            return
        level = self._level(tenant, now_ms)
        missing = min(tokens, self._per_minute) - level
        if missing > 0:
            wait_ms = math.ceil(missing * MINUTE_MS / self._per_minute)
            left = max(0, int(level))
            raise RateLimitExceededError(
                f"this workspace has used its {self._per_minute} tokens per minute",
                Standing(False, "tokens", self._per_minute, left, wait_ms),  # noqa: FBT003
            )
        self._put(tenant, level - tokens, now_ms)

    def give_back(self, tenant: str, tokens: int, now_ms: int) -> None:
        """Return what was reserved and not used; fewer than 0: more was used."""
        if self._per_minute and tenant in self._levels:
            self._put(tenant, self._level(tenant, now_ms) + tokens, now_ms)

    def _level(self, tenant: str, now_ms: int) -> float:
        level, at_ms = self._levels.get(tenant, (float(self._per_minute), now_ms))
        refill = max(0, now_ms - at_ms) * self._per_minute / MINUTE_MS
        return min(self._per_minute, level + refill)

    def _put(self, tenant: str, level: float, now_ms: int) -> None:
        self._levels.pop(tenant, None)
        self._levels[tenant] = (min(self._per_minute, level), now_ms)
        if len(self._levels) > TENANTS_MAX:
            self._levels.popitem(last=False)  # the longest untouched: full again, most likely

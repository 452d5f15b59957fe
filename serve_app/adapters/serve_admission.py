"""Admission through a Serve handle.

Owns the way back of errors: across actors one arrives as a synthesised class, so it is rebuilt
from its code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.core.errors import (
    ErrorCode,
    ModelNotAvailableError,
    NoHostsAvailableError,
    OverloadedError,
    ServeAppError,
)
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.core.routing import Decision

# What answers cannot be told from a handle's type, so the calls below say what they expect.
Handle: TypeAlias = DeploymentHandle[Any]

_BY_CODE: dict[ErrorCode, type[ServeAppError]] = {
    ErrorCode.MODEL_NOT_AVAILABLE: ModelNotAvailableError,
    ErrorCode.NO_HOSTS_AVAILABLE: NoHostsAvailableError,
}


class ServeAdmission:
    """See `ports.Admission`."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def admit(self, request: AdmitRequest) -> Grant:
        """Ask the router."""
        with _router_errors():
            grant: Grant = await self._handle.admit.remote(request)
        return grant

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        """Ask the router why."""
        with _router_errors():
            decisions: tuple[Decision, ...] = await self._handle.decisions.remote(limit)
        return decisions


@contextmanager
def _router_errors() -> Iterator[None]:
    """Rebuild what arrives from another actor."""
    try:
        yield
    except BackPressureError as error:
        raise OverloadedError("the router has too many requests; try again later") from error
    except ServeAppError as error:
        cls = _BY_CODE.get(ErrorCode(error.code))
        if cls is None:
            raise
        raise cls(str(error.args[0])) from None
    except (RayError, DeploymentUnavailableError) as error:
        raise NoHostsAvailableError("the router cannot be reached") from error

"""Admission through a Serve handle.

Owns the way back of errors: across actors one arrives as a synthesised class, so it is rebuilt
from its code.
"""

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
        try:
            grant: Grant = await self._handle.admit.remote(request)
        except BackPressureError as error:
            raise OverloadedError("the router has too many requests; try again later") from error
        except ServeAppError as error:
            cls = _BY_CODE.get(ErrorCode(error.code))
            if cls is None:
                raise
            raise cls(str(error.args[0])) from None
        except (RayError, DeploymentUnavailableError) as error:
            raise NoHostsAvailableError("the router cannot be reached") from error
        return grant

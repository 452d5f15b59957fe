"""Admission through a Serve handle.

Owns the way back of errors: across actors one arrives as a synthesised class, so it is rebuilt
from its code.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.core.errors import (
    DeadlineExceededError,
    ErrorCode,
    ModelNotAvailableError,
    NoHostsAvailableError,
    OverloadedError,
    RateLimitExceededError,
    ServeAppError,
)
from serve_app.core.inference import AdmitRequest, Grant
from serve_app.core.routing import Decision

# What answers cannot be told from a handle's type, so the calls below say what they expect.
Handle: TypeAlias = DeploymentHandle[Any]

_BY_CODE: dict[ErrorCode, type[ServeAppError]] = {
    ErrorCode.MODEL_NOT_AVAILABLE: ModelNotAvailableError,
    ErrorCode.NO_HOSTS_AVAILABLE: NoHostsAvailableError,
    ErrorCode.OVERLOADED: OverloadedError,
    ErrorCode.RATE_LIMIT_EXCEEDED: RateLimitExceededError,
    ErrorCode.TIMEOUT: DeadlineExceededError,
}


class ServeAdmission:
    """See `ports.Admission`.

    Args:
        own_names: by each id of each model, its own; the default model's first. A model has one
            queue, by whichever id it is asked for.
    """

    def __init__(self, handle: Handle, own_names: Mapping[str, str]) -> None:
        self._handle = handle
        self._own_names = own_names
        self._default_model = next(iter(own_names), "")
        self._default_handle: Handle | None = None

    async def admit(self, request: AdmitRequest) -> Grant:
        """Ask the model's router; a caller that is cancelled no longer waits there."""
        model = request.model or self._default_model
        model = self._own_names.get(model, model)
        handle = self._handle_of(model)
        with _router_errors():
            asked = handle.admit.remote(replace(request, model=model))
            try:
                grant: Grant = await asked
            except asyncio.CancelledError:
                asked.cancel()  # type: ignore[no-untyped-call]
                raise
        return grant

    async def decisions(self, limit: int) -> tuple[Decision, ...]:
        """Ask the router why."""
        with _router_errors():
            handle = self._handle_of(self._default_model)
            decisions: tuple[Decision, ...] = await handle.decisions.remote(limit)
        return decisions

    def _handle_of(self, model: str) -> Handle:
        """A handle whose calls all reach the same router; see `main.ONE_ROUTER_PER_MODEL`."""
        if model != self._default_model:
            return self._handle.options(session_id=model)
        if self._default_handle is None:
            self._default_handle = self._handle.options(session_id=model)
        return self._default_handle


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
        raise cls(*error.args) from None
    except (RayError, DeploymentUnavailableError) as error:
        raise NoHostsAvailableError("the router cannot be reached") from error

"""From a request to the principal behind it.

Owns the two headers a key may come in, the workspace header, and the keyless rule of local
development. Invariant: a wrong key is 401 even where no key at all would do.
"""

from urllib.parse import urlsplit

from starlette.requests import Request

from serve_app.core.auth import Principal, Scope
from serve_app.core.errors import ForbiddenError, UnauthorizedError
from serve_app.ports import KeyRing
from serve_app.settings import LOOPBACK_HOSTS


class Authenticator:
    """Keys of the ring, and nobody else but a developer on this machine."""

    def __init__(self, keys: KeyRing, default_workspace: str, *, is_dev: bool) -> None:
        self._keys = keys
        self._developer = Principal(default_workspace, Scope.EXECUTE, "dev")
        self._is_dev = is_dev

    async def principal(self, request: Request, scope: Scope) -> Principal:
        """Who asks.

        Raises:
            UnauthorizedError: no key, or one that is not known.
            ForbiddenError: the key lacks the scope, or belongs to another workspace.
        """
        key = _key(request)
        if key:
            found = await self._keys.find(key)
            if found is None:
                raise UnauthorizedError("this API key is not known")
        elif self._is_dev and _is_local(request):
            found = self._developer
        else:
            raise UnauthorizedError("send an API key: Authorization: Bearer <key>, or X-API-Key")
        workspace = request.headers.get("x-workspace-id")
        if workspace is not None and workspace != found.workspace:
            raise ForbiddenError("X-Workspace-Id is not the key's workspace")
        if not found.can(scope):
            raise ForbiddenError(f"this key has the scope {found.scope}; {scope} is needed")
        return found


def _key(request: Request) -> str:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials:
        return credentials.strip()
    return request.headers.get("x-api-key", "")


def _is_local(request: Request) -> bool:
    """A loopback Host and no foreign Origin: a page of another site cannot speak for the user."""
    if _host(f"//{request.headers.get('host', '')}") not in LOOPBACK_HOSTS:
        return False
    origin = request.headers.get("origin")
    return origin is None or _host(origin) in LOOPBACK_HOSTS


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as an open bracket: nobody's address, so not this machine's
        return None

"""From a request to the principal behind it.

Owns the two headers a key may come in, the query member of a stream token, the workspace header,
and the keyless rule of local development. Invariant: a wrong key is 401 even where no key at all
would do.
"""

from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from serve_app.core.auth import Principal, Scope
from serve_app.core.errors import ForbiddenError, RateLimitExceededError, UnauthorizedError
from serve_app.core.stream_tokens import unseal
from serve_app.ports import Clock, KeyRing
from serve_app.services.limits import KeyLimits
from serve_app.settings import LOOPBACK_HOSTS, Settings


class Authenticator:
    """Keys of the ring, stream tokens, and nobody else but a developer on this machine."""

    def __init__(self, keys: KeyRing, limits: KeyLimits, clock: Clock, settings: Settings) -> None:
        self._keys = keys
        self._limits = limits
        self._clock = clock
        self._secret = settings.cluster_secret.get_secret_value().encode()
        self._developer = Principal(settings.workspace_id, Scope.EXECUTE, "dev")
        self._is_dev = settings.dev

    def has_key(self, request: HTTPConnection) -> bool:
        """Whether a header says who asks; what it says may change, if the key is revoked."""
        return bool(_key(request))

    def is_anonymous(self, request: HTTPConnection) -> bool:
        """Whether nothing says who asks, and it cannot be told without."""
        is_named = self.has_key(request) or bool(request.query_params.get("token"))
        return not is_named and not (self._is_dev and _is_local(request))

    async def principal(
        self, request: HTTPConnection, scope: Scope, sent_key: str = ""
    ) -> Principal:
        """Who asks, by a request or a socket's handshake: a key wins over a token.

        Args:
            request: an HTTP request or a socket's handshake.
            scope: what the caller must be allowed to do.
            sent_key: from a message; it wins over what the handshake said.

        Raises:
            UnauthorizedError: no key, or one that is not known.
            ForbiddenError: the key lacks the scope, or belongs to another workspace.
            RateLimitExceededError: it has used up what it may.
        """
        found = await self._named(request, sent_key)
        workspace = request.headers.get("x-workspace-id")
        if workspace is not None and workspace != found.workspace:
            raise ForbiddenError("X-Workspace-Id is not the key's workspace")
        if not found.can(scope):
            raise ForbiddenError(f"this key has the scope {found.scope}; {scope} is needed")
        if request.scope["type"] == "http":  # a socket counts each of its requests by itself
            await self._limit(request, found)
        return found

    async def _limit(self, request: HTTPConnection, principal: Principal) -> None:
        try:
            request.state.standing = await self._limits.check(principal)
        except RateLimitExceededError as error:
            request.state.standing = error.standing
            raise

    async def _named(self, request: HTTPConnection, sent_key: str) -> Principal:
        if key := sent_key or _key(request):
            found = await self.of_key(key)
        elif token := request.query_params.get("token"):
            found = self.of_token(token, request.scope["path"])
        elif self._is_dev and _is_local(request):
            found = self._developer
        else:
            raise UnauthorizedError("send an API key: Authorization: Bearer <key>, or X-API-Key")
        return found

    async def of_key(self, key: str) -> Principal:
        """Whose key this is, for surfaces where it comes in a message.

        Raises:
            UnauthorizedError: it is not known, or has expired.
        """
        found = await self._keys.find(key)
        if found is None:
            raise UnauthorizedError("this API key is not known")
        return found

    def of_token(self, token: str, path: str) -> Principal:
        """Whom a stream token stands for, on the path it is used on.

        Raises:
            UnauthorizedError: it is none, has run out, or is for another path.
        """
        found = unseal(self._secret, token, path, self._clock.now_ms())
        if found is None:
            raise UnauthorizedError("this stream token has run out, or is not for this path")
        return found


def _key(request: HTTPConnection) -> str:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials:
        return credentials.strip()
    return request.headers.get("x-api-key", "")


def _is_local(request: HTTPConnection) -> bool:
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

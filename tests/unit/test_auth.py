"""Who asks: two headers, three scopes, one workspace, and the developer on this machine."""

from itertools import product

import pytest
from starlette.requests import Request

from serve_app.core.auth import Principal, Scope, key_digest
from serve_app.core.errors import ForbiddenError, InvalidRequestError, UnauthorizedError
from serve_app.core.limits import Limit, Limits
from serve_app.core.stream_tokens import scope_of_resource, seal, unseal
from serve_app.ingress.auth import Authenticator
from serve_app.settings import Settings
from tests.support.virtual_time import EPOCH_MS

KEYS = {
    "reader-key-00000": Principal("w1", Scope.READ, "k1"),
    "runner-key-00000": Principal("w1", Scope.EXECUTE, "k2"),
    "boss-key-0000000": Principal("w1", Scope.ADMIN, "k3"),
}
SECRET = b"secret of the tests"
DEVELOPER = Principal("default", Scope.EXECUTE, "dev")
LOCAL = {"host": "127.0.0.1:8000"}


class FixedClock:
    def now_ms(self) -> int:
        return EPOCH_MS


class NoLimits:
    async def check(self, principal: Principal) -> None:
        return None


class Keys:
    async def find(self, key: str) -> Principal | None:
        return KEYS.get(key)


def a_request(headers: dict[str, str], url: str = "/") -> Request:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    path, _, query = url.partition("?")
    scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": raw}
    return Request(scope)


async def who(
    headers: dict[str, str], scope: Scope = Scope.READ, *, is_dev: bool = False, url: str = "/"
) -> Principal:
    settings = Settings(dev=is_dev, cluster_secret=SECRET.decode())
    authenticator = Authenticator(Keys(), NoLimits(), FixedClock(), settings)
    return await authenticator.principal(a_request(headers, url), scope)


@pytest.mark.parametrize(("held", "asked"), list(product(Scope, Scope)))
def test_each_scope_includes_those_before_it(held: Scope, asked: Scope) -> None:
    order = [Scope.READ, Scope.EXECUTE, Scope.ADMIN]
    assert Principal("w", held, "k").can(asked) == (order.index(held) >= order.index(asked))


def test_a_key_is_stored_under_its_sha256() -> None:
    expected = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
    assert key_digest("key") == expected
    assert key_digest("schlüssel") != key_digest("schlussel")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer runner-key-00000"},
        {"Authorization": "bearer  runner-key-00000 "},
        {"X-API-Key": "runner-key-00000"},
        {"Authorization": "Basic dXNlcjpwYXNz", "X-API-Key": "runner-key-00000"},
        {"Authorization": "Bearer runner-key-00000", "X-Workspace-Id": "w1"},
    ],
)
async def test_a_known_key_in_either_header_is_its_principal(headers: dict[str, str]) -> None:
    assert await who(headers) == KEYS["runner-key-00000"]


@pytest.mark.parametrize("is_dev", [False, True])
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"X-API-Key": "wrong"},
        {"Authorization": "Bearer wrong", "X-API-Key": "runner-key-00000"},
    ],
)
async def test_a_wrong_key_is_refused_in_development_too(
    headers: dict[str, str], is_dev: bool
) -> None:
    with pytest.raises(UnauthorizedError, match="not known"):
        await who({**LOCAL, **headers}, is_dev=is_dev)


async def test_no_key_is_refused() -> None:
    with pytest.raises(UnauthorizedError, match="send an API key"):
        await who(LOCAL)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scope", Scope)
async def test_a_key_does_what_its_scope_allows(key: str, scope: Scope) -> None:
    if KEYS[key].can(scope):
        assert await who({"X-API-Key": key}, scope) == KEYS[key]
    else:
        with pytest.raises(ForbiddenError, match=f"{scope} is needed"):
            await who({"X-API-Key": key}, scope)


async def test_another_workspace_than_the_keys_is_refused() -> None:
    with pytest.raises(ForbiddenError, match="not the key's workspace"):
        await who({"X-API-Key": "boss-key-0000000", "X-Workspace-Id": "w2"})


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "127.0.0.1:8000"},
        {"host": "localhost"},
        {"host": "LOCALHOST:80"},
        {"host": "[::1]:8000"},
        {"host": "localhost:8000", "origin": "http://localhost:3000"},
        {"host": "localhost:8000", "origin": "http://[::1]"},
        {"host": "localhost:8000", "X-Workspace-Id": "default"},
    ],
)
async def test_a_developer_needs_no_key_on_this_machine(headers: dict[str, str]) -> None:
    assert await who(headers, Scope.EXECUTE, is_dev=True) == DEVELOPER


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "example.com"},
        {"host": "localhost.example.com"},
        {"host": "127.0.0.1.example.com:8000"},
        {"host": "example.com#127.0.0.1"},
        {"host": "127.0.0.1@example.com"},
        {"host": "["},
        {"host": "localhost", "origin": "https://example.com"},
        {"host": "localhost", "origin": "null"},
        {"host": "localhost", "origin": "http://["},
    ],
)
async def test_a_stranger_needs_a_key_in_development_too(headers: dict[str, str]) -> None:
    with pytest.raises(UnauthorizedError, match="send an API key"):
        await who(headers, is_dev=True)


async def test_a_developer_is_no_administrator() -> None:
    with pytest.raises(ForbiddenError, match="admin is needed"):
        await who(LOCAL, Scope.ADMIN, is_dev=True)
    with pytest.raises(ForbiddenError, match="workspace"):
        await who({**LOCAL, "X-Workspace-Id": "other"}, is_dev=True)


STREAM = "/v1/executions/exe_1/stream"
READER = Principal("w1", Scope.READ, "k1", Limits(Limit(3, 60_000), None))


def a_token(resource: str = STREAM, *, ttl_ms: int = 1, secret: bytes = SECRET) -> str:
    return seal(secret, READER, resource, EPOCH_MS + ttl_ms)


async def test_a_stream_token_opens_its_path_and_no_other() -> None:
    token = a_token()
    assert await who({}, url=f"{STREAM}?token={token}") == READER
    for path in ("/v1/executions/exe_2/stream", f"{STREAM}/", "/v1/executions/exe_1", "/"):
        with pytest.raises(UnauthorizedError, match="not for this path"):
            await who({}, url=f"{path}?token={token}")


async def test_a_stream_token_reads_only() -> None:
    with pytest.raises(ForbiddenError, match="execute is needed"):
        await who({}, Scope.EXECUTE, url=f"{STREAM}?token={a_token()}")
    with pytest.raises(ForbiddenError, match="workspace"):
        await who({"X-Workspace-Id": "w2"}, url=f"{STREAM}?token={a_token()}")


async def test_a_key_wins_over_a_token_and_a_wrong_token_over_development() -> None:
    url = f"{STREAM}?token={a_token()}"
    assert (await who({"X-API-Key": "boss-key-0000000"}, url=url)).scope is Scope.ADMIN
    with pytest.raises(UnauthorizedError):
        await who({"X-API-Key": "wrong"}, url=url)
    with pytest.raises(UnauthorizedError):
        await who(LOCAL, is_dev=True, url=f"{STREAM}?token=wrong")


def test_a_token_ends_with_its_time() -> None:
    token = a_token(ttl_ms=10)
    assert unseal(SECRET, token, STREAM, EPOCH_MS + 9) == READER
    assert unseal(SECRET, token, STREAM, EPOCH_MS + 10) is None


def test_a_token_of_an_escaped_path_opens_that_path() -> None:
    token = a_token("/stream/user/an%20id%2Fx")
    assert unseal(SECRET, token, "/stream/user/an id/x", EPOCH_MS) == READER


@pytest.mark.parametrize("at", range(0, 120, 7))
def test_a_changed_token_is_none(at: int) -> None:
    token = a_token()
    changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
    assert unseal(SECRET, changed, STREAM, EPOCH_MS) is None


@pytest.mark.parametrize("text", ["", ".", "a", "a.b", "\u00e9.\udc80", "a.b.c", "." * 9])
def test_hostile_text_is_no_token(text: str) -> None:
    assert unseal(SECRET, text, STREAM, EPOCH_MS) is None
    assert unseal(SECRET, a_token(secret=b"another cluster"), STREAM, EPOCH_MS) is None


@pytest.mark.parametrize(
    ("resource", "scope"),
    [
        ("/v1/executions/exe_1/stream", Scope.READ),
        ("/stream/workflow/w", Scope.READ),
        ("/stream/file/f", Scope.READ),
        ("/stream/user/u1", Scope.READ),
        ("/tasks/t/stream", Scope.READ),
        ("/v1/ws", Scope.EXECUTE),
        ("/hosts/h/v1/ws", Scope.EXECUTE),
        ("/v1/executions", None),
        ("/v1/keys", None),
        ("/stream/publish/workflow/w", None),
        ("/v1/executions/a/../b/stream", None),
        ("/v1/ws?x=1", None),
        ("", None),
    ],
)
def test_tokens_are_for_streams(resource: str, scope: Scope | None) -> None:
    if scope is None:
        with pytest.raises(InvalidRequestError, match="no stream tokens"):
            scope_of_resource(resource)
    else:
        assert scope_of_resource(resource) is scope

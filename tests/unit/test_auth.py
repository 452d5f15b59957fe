"""Who asks: two headers, three scopes, one workspace, and the developer on this machine."""

from itertools import product

import pytest
from starlette.requests import Request

from serve_app.core.auth import Principal, Scope, key_digest
from serve_app.core.errors import ForbiddenError, UnauthorizedError
from serve_app.ingress.auth import Authenticator

KEYS = {
    "reader-key-00000": Principal("w1", Scope.READ, "k1"),
    "runner-key-00000": Principal("w1", Scope.EXECUTE, "k2"),
    "boss-key-0000000": Principal("w1", Scope.ADMIN, "k3"),
}
DEVELOPER = Principal("default", Scope.EXECUTE, "dev")
LOCAL = {"host": "127.0.0.1:8000"}


class Keys:
    async def find(self, key: str) -> Principal | None:
        return KEYS.get(key)


def a_request(headers: dict[str, str]) -> Request:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


async def who(
    headers: dict[str, str], scope: Scope = Scope.READ, *, is_dev: bool = False
) -> Principal:
    authenticator = Authenticator(Keys(), "default", is_dev=is_dev)
    return await authenticator.principal(a_request(headers), scope)


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

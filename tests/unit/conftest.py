"""Unit tests reach no network and no cluster: both raise here, so that the tests stay honest."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from typing import NoReturn

import pytest

BARRED = (
    (socket.socket, "connect"),
    (socket.socket, "connect_ex"),
    (socket.socket, "bind"),
    (socket, "create_connection"),
    (asyncio, "open_connection"),
    (asyncio, "open_unix_connection"),
    (asyncio, "start_server"),
    (asyncio, "start_unix_server"),
)


class OutsideWorldError(Exception):
    """A unit test reached for the network or for Ray."""


def refuse(*args: object, **kwargs: object) -> NoReturn:
    raise OutsideWorldError("no sockets and no Ray in tests/unit; use tests/integration")


@pytest.fixture(autouse=True)
def no_outside_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for owner, name in BARRED:
        monkeypatch.setattr(owner, name, refuse)
    if ray := sys.modules.get("ray"):
        monkeypatch.setattr(ray, "init", refuse)
    yield
    # Imported by the test itself, it could not be patched before.
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()
        raise OutsideWorldError("the test started Ray")

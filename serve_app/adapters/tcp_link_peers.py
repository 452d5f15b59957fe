"""The two ends of a link once its bytes are frames: who proves itself to whom, and how.

Owns the hello, the pings and the outbox; what the items of a frame mean is for subclasses to say.
Invariant: no item is handled before its peer has shown that it knows the cluster secret.
"""

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from serve_app.adapters.tcp_link_protocol import LinkProtocol
from serve_app.adapters.tcp_link_wire import (
    VERSION,
    Call,
    Item,
    LinkSettings,
    WireError,
    join_frame,
    pack_frame,
    pack_item,
    proof,
)
from serve_app.core.errors import ConnectionFailedError
from serve_app.ports import Clock, Entropy

FRAME_HEAD_BYTES = 5  # the list header of a frame, at the most

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class LinkContext:
    """What every connection of one end shares."""

    secret: bytes
    clock: Clock
    entropy: Entropy
    settings: LinkSettings


class AcceptedLink(LinkProtocol):
    """The end that was called: it lets a client prove itself, then handles its items."""

    def __init__(self, server: "LinkServer[Any]") -> None:
        context = server.context
        super().__init__(context.clock, context.settings)
        self.is_proven = False
        self._accepted_by = server
        self._secret = context.secret
        self._nonce = context.entropy.token().encode()
        self._hello_timeout: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something runs for the client, so that its silence means that it is gone."""
        raise NotImplementedError

    def handle(self, item: Item) -> None:
        """An item of a proven client; `WireError` breaks the connection off."""
        raise NotImplementedError

    def opened(self) -> None:
        """Say hello, and wait for the answer."""
        if not self._accepted_by.has_room_for_stranger():
            self.break_off("too many peers are proving themselves")
            return
        self._accepted_by.connections.add(self)
        self._hello_timeout = asyncio.get_running_loop().call_later(
            self.settings.hello_timeout_s, partial(self.break_off, "the hello took too long")
        )
        self.send(pack_frame([VERSION, self._nonce]))

    def closed(self) -> None:
        """Nobody is waited for any more."""
        self._accepted_by.connections.discard(self)
        if self._hello_timeout is not None:
            self._hello_timeout.cancel()

    def frame_received(self, items: list[Any]) -> None:
        """See `LinkProtocol`."""
        if not self.is_proven:
            self._check_hello(items)
            return
        for item in items:
            self.handle(item)

    def _check_hello(self, items: list[Any]) -> None:
        match items:
            case [int(version), bytes(nonce), bytes(claim)] if version == VERSION:
                wanted = proof(self._secret, b"client", self._nonce, nonce)
            case _:
                raise WireError("the hello has another layout or version")
        if not hmac.compare_digest(wanted, claim):
            raise WireError("the client does not know the cluster secret")
        self.is_proven = True
        self.trust_peer()
        if self._hello_timeout is not None:
            self._hello_timeout.cancel()
        self.send(pack_frame([proof(self._secret, b"server", self._nonce, nonce)]))


Accepted = TypeVar("Accepted", bound=AcceptedLink)


class LinkServer(Generic[Accepted]):
    """Listens, and knows its connections; subclasses say what one of them is."""

    def __init__(self, context: LinkContext) -> None:
        self.context = context
        self.connections: set[Accepted] = set()
        self._host = ""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    def accept(self) -> Accepted:
        """A new connection."""
        raise NotImplementedError

    @property
    def address(self) -> Address:
        """Where it listens; port 0 before `start`."""
        return self._host, self._port

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 lets the system choose."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self.accept, host, port)
        self._host = host
        self._port = self._server.sockets[0].getsockname()[1]
        self._sweep_later()

    async def close(self) -> None:
        """Stop listening, break every connection off and end what ran for it."""
        if self._sweep is not None:
            self._sweep.cancel()
        if self._server is not None:
            self._server.close()
        for connection in tuple(self.connections):
            connection.break_off("the server stops")
        if self._server is not None:
            await self._server.wait_closed()

    def has_room_for_stranger(self) -> bool:
        """Whether one more peer may try to prove itself."""
        stranger_count = sum(not connection.is_proven for connection in self.connections)
        return stranger_count < self.context.settings.strangers_max

    def _sweep_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = loop.call_later(self.context.settings.ping_interval_s, self._sweep_silent)

    def _sweep_silent(self) -> None:
        for connection in tuple(self.connections):
            is_silent = connection.silence_s() > self.context.settings.silence_max_s
            if connection.is_busy and is_silent:
                connection.break_off("the client was silent for too long")
        self._sweep_later()


class CallingLink(LinkProtocol):
    """The end that calls: it proves itself, and pings so that it never meets a vanished peer."""

    def __init__(self, context: LinkContext, peer: str) -> None:
        super().__init__(context.clock, context.settings)
        self.proven = asyncio.Event()  # also set when the connection closed before
        self.forget: Callable[[], None] = lambda: None  # told once it is closed
        self._peer = peer
        self._secret = context.secret
        self._nonce = context.entropy.token().encode()
        self._server_nonce: bytes | None = None
        self._outbox: list[bytes] = []
        self._outbox_bytes = FRAME_HEAD_BYTES
        self._ping: asyncio.TimerHandle | None = None

    def handle(self, item: Item) -> None:
        """An item of the server; `WireError` breaks the connection off."""
        raise NotImplementedError

    def push(self, packed: bytes) -> None:
        """Send a packed item with this turn's frame."""
        if self._outbox_bytes + len(packed) > self.settings.frame_bytes_max:
            self.flush()
        self._outbox.append(packed)
        self._outbox_bytes += len(packed)
        self.schedule_flush()

    def opened(self) -> None:
        """See `LinkProtocol`."""
        self._ping_later()

    def closed(self) -> None:
        """See `LinkProtocol`."""
        if self._ping is not None:
            self._ping.cancel()
        self.proven.set()
        self.forget()

    def frame_received(self, items: list[Any]) -> None:
        """See `LinkProtocol`."""
        if not self.proven.is_set():
            self._continue_hello(items)
            return
        for item in items:
            self.handle(item)

    def flush(self) -> None:
        """See `LinkProtocol`."""
        if self._outbox:
            self.send(join_frame(self._outbox))
            self._outbox.clear()
            self._outbox_bytes = FRAME_HEAD_BYTES

    def _continue_hello(self, items: list[Any]) -> None:
        match items:
            case [int(version), bytes(nonce)] if version == VERSION and self._server_nonce is None:
                self._server_nonce = nonce
                claim = proof(self._secret, b"client", nonce, self._nonce)
                self.send(pack_frame([VERSION, self._nonce, claim]))
            case [bytes(claim)] if self._server_nonce is not None:
                wanted = proof(self._secret, b"server", self._server_nonce, self._nonce)
                if not hmac.compare_digest(wanted, claim):
                    raise WireError(f"the {self._peer} does not know the cluster secret")
                self.trust_peer()
                self.proven.set()
            case _:
                raise WireError("the hello has another layout or version")

    def _ping_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._ping = loop.call_later(self.settings.ping_interval_s, self._ping_now)

    def _ping_now(self) -> None:
        # Idle connections are pinged too, so that a request never meets one whose peer vanished.
        if self.silence_s() > self.settings.silence_max_s:
            self.break_off(f"the {self._peer} was silent for too long")
            return
        if self.proven.is_set():
            self.push(pack_item([Call.PING]))
        self._ping_later()


Link = TypeVar("Link", bound=CallingLink)


class Links(Generic[Link]):
    """One connection to each address, made when it is first wanted.

    Args:
        make: a connection that is not connected yet.
        peer: what is at the other end, for the errors.
        changed: told how many connections there are.
    """

    def __init__(
        self,
        make: Callable[[], Link],
        peer: str,
        context: LinkContext,
        changed: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._make = make
        self._peer = peer
        self._settings = context.settings
        self._changed = changed
        self._open: dict[Address, Link] = {}
        self._attempts: dict[Address, asyncio.Task[Link]] = {}
        self._is_closed = False

    async def get(self, address: Address) -> Link:
        """The connection to an address.

        Raises:
            ConnectionFailedError: there is none in time, or no longer.
        """
        if (link := self._open.get(address)) is not None:
            return link
        if self._is_closed:
            raise ConnectionFailedError("the link is closed")
        attempt = self._attempts.get(address)
        if attempt is None:
            # A task of its own, because an opener that is cancelled must not cancel the others'
            # attempt; it ends by its own time-out and `close` ends it earlier.
            attempt = asyncio.create_task(self._connect(address))  # noqa: TID251
            self._attempts[address] = attempt
        return await asyncio.shield(attempt)

    async def close(self) -> None:
        """Break every connection off."""
        self._is_closed = True
        attempts = tuple(self._attempts.values())
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
        for link in tuple(self._open.values()):
            link.break_off("the link was closed")

    async def _connect(self, address: Address) -> Link:
        link = self._make()
        link.forget = partial(self._forget, address, link)
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(lambda: link, *address)
                await link.proven.wait()
            if link.is_closed:
                raise ConnectionFailedError(f"no link to the {self._peer}: {link.reason}")
        except TimeoutError as error:
            link.break_off("the hello took too long")
            raise ConnectionFailedError(f"the {self._peer} did not answer in time") from error
        except OSError as error:
            raise ConnectionFailedError(f"the {self._peer} cannot be reached: {error}") from error
        except asyncio.CancelledError:
            link.break_off("the link was closed")
            raise
        finally:
            del self._attempts[address]
        self._open[address] = link
        self._changed(len(self._open))
        return link

    def _forget(self, address: Address, link: Link) -> None:
        if self._open.get(address) is link:
            del self._open[address]
            self._changed(len(self._open))

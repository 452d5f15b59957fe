"""HttpClient on aiohttp: the one way a request of ours leaves the cluster.

Owns the connections and where they may go. Invariant: the decision is taken on the address that is
connected to, at the moment of connecting (`_open_socket`), so a name server whose answer changes
between check and connect changes nothing, and a literal address passes the same place. A pooled
connection was judged when it was made; the allow-list does not change while the process lives.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

from aiohttp import (
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
)
from aiohttp.abc import AbstractResolver, ResolveResult

from serve_app.core.egress import Network, check_url, permitted, refusal
from serve_app.core.errors import DeadlineExceededError, EgressRefusedError, ExchangeFailedError
from serve_app.ports import HttpAnswer, HttpRequest

CONNECTIONS_MAX = 1024
LOOKUP_THREADS = 32  # a name server that hangs must not hold up everybody else's names
KEEP_ALIVE_S = 4.0  # below the 5 s of common servers: a POST is not sent again on a closed one
NAMES_KEPT_S = 10  # between asking a name server twice
_REASON_MAX = 200

AddressInfo = tuple[Any, ...]  # as getaddrinfo gives it: family, type, protocol, name, address
LookUp = Callable[[str, int], Awaitable[Sequence[str]]]


class GuardedHttp:
    """One pool of connections for a process; opens with its first use.

    Args:
        allowed: the operator's networks, `core.egress.parse_networks`.
        look_up: a host's addresses; by default the system's own resolver.
        tls: what certificates are checked against; by default the system's authorities.
    """

    def __init__(
        self,
        allowed: Sequence[Network],
        *,
        look_up: LookUp | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed = allowed
        self._look_up = look_up
        self._tls = tls or ssl.create_default_context()
        self._session: ClientSession | None = None

    async def request(self, request: HttpRequest) -> HttpAnswer:
        """See `ports.HttpClient`."""
        check_url(request.url, self._allowed)
        session = self._session = self._session or self._open_session()
        try:
            async with (
                asyncio.timeout(request.timeout_s),
                session.request(
                    request.method,
                    request.url,
                    data=request.body,
                    headers=request.headers,
                    allow_redirects=False,
                ) as response,
            ):
                return await _read(response, request.answer_bytes_max)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"no complete answer within {request.timeout_s:g} s"
            ) from error
        except (ClientError, OSError, ValueError, UnicodeError) as error:
            refused = _refused_in(error)
            raise refused or ExchangeFailedError(_reason(error)) from error

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _open_session(self) -> ClientSession:
        connector = TCPConnector(
            limit=CONNECTIONS_MAX,
            keepalive_timeout=KEEP_ALIVE_S,
            ttl_dns_cache=NAMES_KEPT_S,
            resolver=_Resolver(self._allowed, self._look_up),
            socket_factory=self._open_socket,
            ssl=self._tls,
        )
        return ClientSession(
            connector=connector,
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None),
            trust_env=False,
            auto_decompress=False,  # a small answer must not grow a thousandfold in here
            headers={"Accept-Encoding": "identity"},
        )

    def _open_socket(self, info: AddressInfo) -> socket.socket:
        family, kind, protocol, _, address = info
        reason = refusal(ip_address(address[0]), self._allowed)
        if reason is not None:
            raise _RefusedError(reason)
        return socket.socket(family, kind, protocol)


class _RefusedError(OSError):
    """Carries a refusal through aiohttp, which lets an OSError through and wraps it."""


class _Resolver(AbstractResolver):
    """Names to permitted addresses, in threads of its own."""

    def __init__(self, allowed: Sequence[Network], look_up: LookUp | None) -> None:
        self._allowed = allowed
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="names")
        self._look_up = look_up or self._ask_system

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - aiohttp's signature
    ) -> list[ResolveResult]:
        """The addresses that may be connected to. Raises OSError when there is none."""
        found = [ip_address(text) for text in await self._look_up(host, port)]
        if not found:
            raise OSError(f"{host} has no address")
        try:
            addresses = permitted(host.rstrip("."), found, self._allowed)
        except EgressRefusedError as error:
            raise _RefusedError(str(error)) from error
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,  # noqa: PLR2004 - the version
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(
            self._threads,
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        )
        return tuple(dict.fromkeys(str(info[4][0]) for info in infos))


async def _read(response: ClientResponse, size_max: int) -> HttpAnswer:
    """The status, the headers and the first bytes; a longer body costs its connection."""
    parts, size, is_cut = [], 0, False
    async for part in response.content.iter_any():
        parts.append(part[: size_max - size])
        size += len(part)
        if size > size_max:
            is_cut = True
            response.close()
            break
    headers: dict[str, str] = {}
    for name, value in response.headers.items():
        headers.setdefault(name.lower(), value)
    return HttpAnswer(response.status, headers, b"".join(parts), is_cut)


def _refused_in(error: BaseException) -> EgressRefusedError | None:
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, _RefusedError):
            return EgressRefusedError("the URL leads to an address that is not permitted")
        inner = inner.__cause__ or inner.__context__
    return None


def _reason(error: Exception) -> str:
    """In words, without the addresses that a name had."""
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        return "the server's TLS certificate was not accepted"
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, socket.gaierror):
        return "the host's name cannot be resolved"
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"no connection: {cause.strerror or type(cause).__name__}"[:_REASON_MAX]
    return f"{type(error).__name__}: broken exchange"[:_REASON_MAX]

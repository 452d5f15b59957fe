"""Direct inference: tokens from a host, over a socket that many answers share.

Owns the options, the sockets and the retries of `InferenceManager`. `client.hosts` and
`client.sessions` are beside it. Invariant: nothing is asked twice once a token has come, nor a turn
of a session once it may have been heard: its answer could be kept twice.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict, Unpack
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import ValidationError

from inferpipe import _http as http
from inferpipe._websocket import NotSentError, SocketOptions, WebSocketClient
from inferpipe.client import AsyncInferPipe
from inferpipe.errors import (
    ConnectionFailedError,
    InvalidArgumentError,
    InvalidPromptError,
    NoHostsAvailableError,
)
from inferpipe.wire import (
    ChunkMessage,
    EndMessage,
    HostView,
    SocketEndReason,
    SocketInference,
    SocketUsage,
)

SOCKET_PATH = "/v1/ws"
_DELAY_S = 0.25  # before the first retry; doubled for each further one
_DELAY_MAX_S = 8.0
_WS_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    """Settings of an `InferenceManager`.

    Args:
        default_model: where a call names none; None: the server's.
        max_retries: further tries for a host that cannot be reached or has no room.
        connection_timeout: ms, for one connection.
        stream_buffer_size: pieces of an answer that wait for a slow reader; more merge.
        compression_enabled: permessage-deflate.
    """

    default_model: str | None = None
    max_retries: int = 3
    connection_timeout: int = 30_000
    stream_buffer_size: int = 100
    compression_enabled: bool = True

    def __post_init__(self) -> None:
        if self.max_retries < 0 or self.connection_timeout < 1 or self.stream_buffer_size < 1:
            raise InvalidArgumentError(
                "max_retries is 0 or more, connection_timeout and stream_buffer_size 1 or more"
            )


class InferenceOptions(TypedDict, total=False):
    """What a call may say beside its prompt.

    `timeout` is in ms, for all of the answer. `stream=False`: the answer comes in one piece.
    `host_address`: a host's id or `ws://` address; not for `direct_inference`, which names one.
    """

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    stream: bool
    stop_sequences: list[str]
    timeout: int
    host_address: str


@dataclass(slots=True)
class _Outcome:
    """What is known at the end of an answer."""

    finish_reason: SocketEndReason | None = None
    usage: SocketUsage | None = None
    resumed: str | None = None


class InferenceStream:
    """An answer's text, piece by piece: iterate over it, once. Leaving early cancels it."""

    def __init__(self, pieces: AsyncGenerator[str, None], outcome: _Outcome) -> None:
        # The generator knows nothing of this object: when a loop over it is left, both are freed
        # at once, and the generator's end cancels the answer.
        self._pieces = pieces
        self._outcome = outcome

    @property
    def finish_reason(self) -> SocketEndReason | None:
        """`stop` or `length`, after the last piece."""
        return self._outcome.finish_reason

    @property
    def usage(self) -> SocketUsage | None:
        """Tokens as the engine counted them, after the last piece."""
        return self._outcome.usage

    @property
    def resumed(self) -> str | None:
        """`exact` or `approximate`, after the last piece, where another host went on with it."""
        return self._outcome.resumed

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Cancel the answer unless it is complete."""
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class InferenceManager:
    """Answers over sockets: one socket for each host address, shared by all answers from there.

    Args:
        client: says where the server is, and who asks. It is not closed here.
        config: how to connect, and how often to try.
    """

    def __init__(self, client: AsyncInferPipe, config: InferenceConfig | None = None) -> None:
        self.config = config or InferenceConfig()
        self._client = client
        self._sockets: dict[str, WebSocketClient] = {}
        self._connecting: dict[str, asyncio.Lock] = {}

    def stream_inference(self, prompt: str, **options: Unpack[InferenceOptions]) -> InferenceStream:
        """Answer a prompt on the host that the server chooses, or on `host_address`.

        Raises:
            InferenceError: while it is iterated over; its class says which.
        """
        return self._stream(self._address(options), self._request(prompt, options))

    def direct_inference(
        self, prompt: str, host_url: str, **options: Unpack[InferenceOptions]
    ) -> InferenceStream:
        """Answer a prompt on one host, by its socket's address. The client's key is sent there."""
        return self._stream(_checked_url(host_url), self._request(prompt, options))

    def session_inference(
        self, session_id: str, prompt: str, **options: Unpack[InferenceOptions]
    ) -> InferenceStream:
        """Speak the next turn of a session; it is kept when the answer is complete."""
        request = self._request(prompt, options, session_id)
        return self._stream(self._address(options), request)

    async def select_best_host(
        self,
        model: str | None = None,
        *,
        min_stake: str | None = None,
        max_latency: int | None = None,
        region: str | None = None,
    ) -> HostView:
        """Return the best host for the model, or the default one; see `client.hosts.select`."""
        wanted = model or self.config.default_model
        if wanted is None:
            raise InvalidArgumentError("name a model, here or as the default_model")
        return await self._client.hosts.select(
            wanted, min_stake=min_stake, max_latency=max_latency, region=region
        )

    async def connect_to_host(self, host_url: str) -> WebSocketClient:
        """Return the open socket to a host, which later answers from there share.

        Raises:
            ConnectionFailedError: also after the retries.
        """
        url = _checked_url(host_url)
        return await self._with_retries(lambda: self._socket(url))

    async def aclose(self) -> None:
        """Close the sockets; what runs on them is cancelled."""
        for socket in tuple(self._sockets.values()):
            await socket.aclose()
        self._sockets.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _address(self, options: InferenceOptions) -> str:
        host = options.get("host_address", "")
        if "://" in host:
            return _checked_url(host)
        below = f"/hosts/{quote(host, safe='')}" if host else ""
        return _checked_url(self._client.config.url(below + SOCKET_PATH))

    def _request(
        self, prompt: str, options: InferenceOptions, session_id: str | None = None
    ) -> SocketInference:
        renamed = {"stop_sequences": "stop"}
        members: dict[str, object] = {
            renamed.get(name, name): value
            for name, value in options.items()
            if name != "host_address"
        }
        if session_id is not None:
            members["session_id"] = session_id
        elif self.config.default_model is not None:
            members.setdefault("model", self.config.default_model)
        try:
            return SocketInference.model_validate({"prompt": prompt, **members})
        except ValidationError as error:
            if any(detail["loc"] == ("prompt",) for detail in error.errors()):
                raise InvalidPromptError(
                    "INVALID_PROMPT", "the prompt must be a text that says something"
                ) from None
            raise InvalidArgumentError(f"the options have the wrong shape: {error}") from error

    def _stream(self, url: str, request: SocketInference) -> InferenceStream:
        outcome = _Outcome()
        return InferenceStream(self._pieces(url, request, outcome), outcome)

    async def _pieces(
        self, url: str, request: SocketInference, outcome: _Outcome
    ) -> AsyncGenerator[str, None]:
        async with aclosing(self._begun(url, request)) as messages:
            async for message in messages:
                if isinstance(message, EndMessage):
                    outcome.finish_reason = message.finish_reason
                    outcome.usage = message.usage
                    outcome.resumed = message.resumed
                elif message.content:
                    yield message.content

    async def _begun(
        self, url: str, request: SocketInference
    ) -> AsyncGenerator[ChunkMessage | EndMessage, None]:
        """Yield the messages of an answer, begun again until the first one has come."""
        tries_left = self.config.max_retries
        while True:
            has_begun = False
            try:
                socket = await self._socket(url)
                async with aclosing(socket.answer(request)) as messages:
                    async for message in messages:
                        has_begun = True
                        yield message
                    return
            except NoHostsAvailableError:
                if has_begun or not tries_left:
                    raise
            except ConnectionFailedError as error:
                is_heard = not isinstance(error, NotSentError)
                may_be_kept = is_heard and request.session_id is not None
                if has_begun or may_be_kept or not tries_left:
                    raise
            await self._pause(tries_left)
            tries_left -= 1

    async def _with_retries(
        self, attempt: Callable[[], Awaitable[WebSocketClient]]
    ) -> WebSocketClient:
        for tries_left in range(self.config.max_retries, 0, -1):
            try:
                return await attempt()
            except ConnectionFailedError:
                await self._pause(tries_left)
        return await attempt()

    async def _pause(self, tries_left: int) -> None:
        longest_s = _DELAY_S * 2 ** (self.config.max_retries - tries_left)
        await http.async_sleep(min(longest_s, _DELAY_MAX_S) * (0.5 + http.jitter() / 2))

    async def _socket(self, url: str) -> WebSocketClient:
        async with self._connecting.setdefault(url, asyncio.Lock()):
            socket = self._sockets.get(url)
            if socket is None or not socket.is_open:
                socket = WebSocketClient(url, self._socket_options())
                await socket.connect()
                self._sockets[url] = socket
            return socket

    def _socket_options(self) -> SocketOptions:
        config = self.config
        return SocketOptions(
            headers=self._client.config.headers,
            connection_timeout=config.connection_timeout,
            stream_buffer_size=config.stream_buffer_size,
            compression_enabled=config.compression_enabled,
        )


def _checked_url(url: str) -> str:
    """The address of a socket, given one or a page of the API.

    Raises:
        InvalidArgumentError: it is none.
    """
    parts = urlsplit(url)
    scheme = _WS_SCHEMES.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise InvalidArgumentError(f"a host's address begins with ws:// or wss://: {url!r}")
    return urlunsplit((scheme, parts.netloc, parts.path or SOCKET_PATH, parts.query, ""))

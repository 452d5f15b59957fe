"""The half of a token link that both sides share: frames in, frames out, silence, breaking off.

Owns one connection's transport. Knows neither streams nor the hello's order: the server's and the
client's protocols add those. Invariant: after `break_off` or a lost connection no frame is handled
and `closed` has run exactly once.
"""

import asyncio
import logging
from typing import Any, cast

from serve_app.adapters.tcp_link_wire import HELLO_BYTES_MAX, FrameReader, LinkSettings, WireError
from serve_app.ports import Clock

logger = logging.getLogger(__name__)


class LinkProtocol(asyncio.Protocol):
    """One connection; subclasses say what a frame means.

    `asyncio.Protocol` and not streams: a reader task and its wake-ups would cost more than the
    parsing of a frame.
    """

    def __init__(self, clock: Clock, settings: LinkSettings) -> None:
        self.settings = settings
        self.is_closed = False
        self.is_paused = False
        self.reason = "the peer closed the connection"
        self._clock = clock
        self._heard_at_s = clock.monotonic_s()
        self._reader = FrameReader(HELLO_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._is_flush_due = False

    def opened(self) -> None:
        """The transport stands."""
        raise NotImplementedError

    def frame_received(self, items: list[Any]) -> None:
        """A frame came; `WireError` breaks the connection off."""
        raise NotImplementedError

    def closed(self) -> None:
        """The connection is gone; `reason` says why."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send what has been gathered in this turn of the loop."""
        raise NotImplementedError

    def trust_peer(self) -> None:
        """Accept frames of full size: the peer has proved itself."""
        self._reader.bytes_max = self.settings.frame_bytes_max

    def send(self, frame: bytes) -> None:
        """Hand one frame to the transport."""
        if self._transport is not None and not self.is_closed:
            self._transport.write(frame)

    def schedule_flush(self) -> None:
        """Have `flush` called once, when the callbacks that are ready now have run.

        So everything that one engine step, or one turn of the loop, says leaves as one frame, and
        a lone token waits for nothing.
        """
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush_now)

    def silence_s(self) -> float:
        """How long the peer has said nothing."""
        return self._clock.monotonic_s() - self._heard_at_s

    def break_off(self, reason: str) -> None:
        """Close at once; what was not sent is lost. Idempotent."""
        if self.is_closed:
            return
        self.reason = reason
        if self._transport is not None:
            self._transport.abort()
        self._close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio: the connection stands."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self.settings.write_buffer_bytes)
        self.opened()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio: bytes came."""
        self._heard_at_s = self._clock.monotonic_s()
        try:
            for items in self._reader.feed(data):
                if self.is_closed:
                    return
                self.frame_received(items)
        except WireError as error:
            logger.warning("link broken off", extra={"reason": str(error)})
            self.break_off(str(error))

    def pause_writing(self) -> None:
        """Called by asyncio: the peer reads too slowly."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """Called by asyncio: the peer has caught up."""
        self.is_paused = False
        self.schedule_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio: the connection is gone."""
        if exc is not None and not self.is_closed:
            self.reason = f"the connection broke: {exc}"
        self._close()

    def _flush_now(self) -> None:
        self._is_flush_due = False
        if not self.is_closed:
            self.flush()

    def _close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.closed()

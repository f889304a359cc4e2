"""The driver's connection with a transport that reads and writes more than a frame at a time.

The driver asks the kernel nine times for each message that it is sent, and once for each that it
sends. This transport takes what has come and gives its frames one by one; and while it is corked it
keeps what is written, to send it together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from struct import error as struct_error
from struct import unpack_from
from typing import Any

import amqp
from amqp.exceptions import FrameSyntaxError, UnexpectedFrame
from amqp.method_framing import frame_handler
from amqp.serialization import dumps
from amqp.transport import SSLTransport, TCPTransport

from duly.brokers.rabbitmq.wire import UNREADABLE

_AT_ONCE = 64 * 1024
_HEADER, _END = 7, 0xCE
# More than any server agrees to. A size above it is read from the middle of something.
_LARGEST_FRAME = 128 * 1024 * 1024

Frame = tuple[int, int, bytes]
"""Its type, its channel, and what is in it."""


class _Buffered:
    """What both kinds of transport share; mixed in before one of the driver's."""

    sock: Any
    connected: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._held = b""
        self._at = 0
        self._corked: bytearray | None = None
        super().__init__(*args, **kwargs)

    # --- reading

    def read_frame(self, *_: Any) -> Frame:
        """The next frame, waiting for it, as the driver reads where it waits for an answer."""
        while (frame := self.frame_at_hand()) is None:
            self.fill()
        return frame

    def frame_at_hand(self) -> Frame | None:
        """The next frame, if all of it has been taken from the socket."""
        held, at = self._held, self._at
        if len(held) - at < _HEADER + 1:
            return None
        kind, channel, size = unpack_from(">BHI", held, at)
        begin = at + _HEADER
        end = begin + size
        if size > _LARGEST_FRAME:
            raise UnexpectedFrame(f"received a frame of {size:,} bytes")
        if len(held) <= end:
            return None
        if held[end] != _END:
            raise UnexpectedFrame(f"received frame_end {held[end]:#04x} while expecting 0xce")
        self._at = end + 1
        return kind, channel, held[begin:end]

    def fill(self) -> None:
        """Take what has come, waiting for some of it; raises `OSError` where the peer is gone."""
        try:
            come = self.sock.recv(_AT_ONCE)
            if not come:
                raise OSError("the server closed the connection")
        except TimeoutError:
            raise
        except OSError:
            self.connected = False
            raise
        self._held, self._at = self._held[self._at :] + come, 0

    @property
    def has_more(self) -> bool:
        """Whether something was taken from the network that the socket will not announce."""
        pending = getattr(self.sock, "pending", None)
        return pending is not None and pending() > 0

    # --- writing

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        """What is written meanwhile is sent together at the end, or whenever it is much."""
        if self._corked is not None:
            yield
            return
        self._corked = bytearray()
        try:
            yield
        finally:
            kept, self._corked = self._corked, None
            if kept and self.sock is not None:
                self.write(kept)

    def write(self, some: Any) -> None:
        """As the driver's."""
        corked = self._corked
        if corked is None:
            super().write(some)  # type: ignore[misc]
            return
        corked += some
        if len(corked) > _AT_ONCE:
            # Emptied first: what fails in the middle must not be sent twice.
            self._corked = bytearray()
            super().write(corked)  # type: ignore[misc]


class BufferedTCP(_Buffered, TCPTransport):  # type: ignore[misc]
    """Over TCP."""


class BufferedTLS(_Buffered, SSLTransport):  # type: ignore[misc]
    """Over TLS."""


_HEADER_FRAME = 2
# Class, weight and size of the body; then come the properties.
_BEFORE_PROPERTIES = 12


def _reading(connection: Any, callback: Callable[..., None]) -> Callable[[Frame], Any]:
    """As the driver's, for properties that it cannot read as well: what raised here would end the
    connection, and the server would give the same message to the next one, for ever.
    """
    handle = frame_handler(connection, callback)

    def on_frame(frame: Frame) -> Any:
        kind, channel, held = frame
        try:
            return handle(frame)
        except (ValueError, OverflowError, OSError, struct_error, FrameSyntaxError) as error:
            if kind != _HEADER_FRAME:
                raise
            # A failure behind the properties is told by this, which then expects another frame.
            why = {UNREADABLE: f"{type(error).__name__}: {error}"[:200]}
            only = b"\x20\x00" + dumps("F", [why])
            return handle((kind, channel, held[:_BEFORE_PROPERTIES] + only))

    return on_frame


class BufferedConnection(amqp.Connection):  # type: ignore[misc]
    """The driver's connection, on such a transport. Bodies stay as they were sent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, frame_handler=_reading, **kwargs)

    def channel(self, *args: Any, **kwargs: Any) -> Any:
        """As the driver's, which would decode a body by what its ``content-encoding`` says."""
        channel = super().channel(*args, **kwargs)
        channel.auto_decode = False
        return channel

    def Transport(  # noqa: N802 - the driver's name
        self, host: str, connect_timeout: float, ssl: Any, *more: Any, **named: Any
    ) -> Any:
        """As the driver's, which calls it to connect."""
        names = ("read_timeout", "write_timeout", "socket_settings")
        named |= dict(zip(names, more, strict=False))
        if ssl:
            return BufferedTLS(host, connect_timeout=connect_timeout, ssl=ssl, **named)
        return BufferedTCP(host, connect_timeout=connect_timeout, **named)

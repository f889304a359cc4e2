"""The driver's connection with a transport that reads and writes more than a frame at a time.

The driver asks the kernel nine times for each message that it is sent, and once for each that it
sends. This transport takes what has come and gives its frames one by one; while it is corked it
keeps what is written, to send it together; and it sends for other threads than the one that reads.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from struct import pack, unpack_from
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import UnexpectedFrame
from amqp.method_framing import frame_handler
from amqp.transport import SSLTransport, TCPTransport

_AT_ONCE = 64 * 1024
_NO_WAIT = getattr(socket, "MSG_DONTWAIT", 0)
_HEADER, _END = 7, 0xCE
# More than any server agrees to. A size above it is read from the middle of something.
_LARGEST_FRAME = 128 * 1024 * 1024

# Kinds of frames; and what stands before the properties in theirs.
_METHOD, _PROPERTIES, _ABOUT = 1, 2, 12
_CONFIRMATION = pack(">HH", *spec.Basic.Ack)
UNREADABLE = "duly-unreadable"
"""A header, in place of all properties where the driver cannot read them: its error."""

# So long whoever keeps a channel waits for an answer on it: one queue that answers nothing must not
# keep the others of the connection waiting until its heartbeats are over.
_ANSWER_S = 10.0

Frame = tuple[int, int, bytes]
"""Its type, its channel, and what is in it."""


class _Buffered:
    """What both kinds of transport share; mixed in before one of the driver's."""

    sock: Any
    connected: bool

    is_direct: bool
    """Whether a thread may send while another one reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._held = b""
        self._at = 0
        self._corked = False
        # What is to be sent before anything else; and whether more is just being sent.
        self._unsent = bytearray()
        self._flushing = False
        self._sending = threading.Lock()
        # Called between the pieces of what leaves, and of what is waited for.
        self.on_moved: Callable[[], None] = lambda: None
        self.on_come: Callable[[], None] = lambda: None
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

    def put_back(self, frame: Frame) -> None:
        """This was the last that was taken, and is the next one again."""
        self._at -= _HEADER + len(frame[2]) + 1

    def fill(self) -> None:
        """Take what has come, waiting for some of it; raises `OSError` where the peer is gone."""
        self._fill(0)
        self.on_come()

    def fill_at_hand(self) -> None:
        """The same without waiting, where others read as well."""
        with contextlib.suppress(BlockingIOError):
            self._fill(_NO_WAIT if self.is_direct else 0)

    def _fill(self, flags: int) -> None:
        try:
            come = self.sock.recv(_AT_ONCE, flags)
            if not come:
                raise OSError("the server closed the connection")
        except (TimeoutError, BlockingIOError):
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
        if self._corked:
            yield
            return
        self._corked = True
        try:
            yield
        finally:
            self._corked = False
            if self.sock is not None:
                self.flush()

    def write(self, some: Any) -> None:
        """As the driver's."""
        with self._sending:
            self._unsent += some
            much = len(self._unsent) > _AT_ONCE
        if much or not self._corked:
            self.flush()

    def flush(self) -> None:
        """Send what is left, waiting for the peer to take it. On the thread that reads.

        In pieces: a line that is slow takes one after the other, and one that hangs takes none.
        """
        while True:
            with self._sending:
                # Taken first: what fails in the middle must not be sent twice.
                some, self._unsent = self._unsent, bytearray()
                self._flushing = bool(some)
            if not some:
                return
            for at in range(0, len(some), _AT_ONCE):
                super().write(memoryview(some)[at : at + _AT_ONCE])  # type: ignore[misc]
                # That a heartbeat leaves says nothing of the peer: the system takes it.
                if len(some) > _AT_ONCE:
                    self.on_moved()

    def offer(self, some: bytes) -> None:
        """Send whole frames as far as the network takes them at once, and leave the rest to
        `flush`. From any thread. Raises `OSError` where the peer is gone.
        """
        with self._sending:
            sent = 0
            if self.is_direct and not self.is_behind:
                if self.sock is None:
                    raise OSError("the connection is closed")
                with contextlib.suppress(BlockingIOError):
                    sent = self.sock.send(some, _NO_WAIT)
            if sent < len(some):
                self._unsent += some[sent:]

    @property
    def is_behind(self) -> bool:
        """Whether something is left to `flush`."""
        return bool(self._unsent) or self._flushing

    def close(self) -> None:
        """As the driver's; never while somebody sends, whose bytes might go to whatever has the
        number of this socket next.
        """
        with self._sending if self.is_direct else contextlib.nullcontext():
            super().close()  # type: ignore[misc]


class BufferedTCP(_Buffered, TCPTransport):  # type: ignore[misc]
    """Over TCP."""

    is_direct = hasattr(socket, "MSG_DONTWAIT")


class BufferedTLS(_Buffered, SSLTransport):  # type: ignore[misc]
    """Over TLS, whose state belongs to one thread."""

    is_direct = False


def is_confirmation(frame: Frame) -> bool:
    """Whether the server says that it has what was published."""
    return frame[0] == _METHOD and frame[2].startswith(_CONFIRMATION)


def _frames(connection: Any, callback: Callable[..., Any]) -> Callable[[Frame], Any]:
    """The driver's, which does not survive a message that it cannot read: text that is no UTF-8, a
    time after the year 9999. The server keeps that, and would deliver it to the next connection.
    """
    reached = 0

    def reach(*args: Any) -> Any:
        nonlocal reached
        reached += 1
        return callback(*args)

    handle = frame_handler(connection, reach)

    def on_frame(frame: Frame) -> Any:
        kind, channel, payload = frame
        if connection.confirmed is not None and is_confirmation(frame):
            connection.bytes_recv += 1  # which tells that the peer is there
            connection.confirmed(channel, *unpack_from(">Q?", payload, 4))
            return True
        if kind == _METHOD and not payload.isascii():
            return handle((kind, channel, _with_plain_key(payload)))
        if kind != _PROPERTIES:
            return handle(frame)
        # A count: what is called may wait for an answer, and so read further messages.
        before = reached
        try:
            return handle(frame)
        except Exception as error:
            if reached != before:
                raise
            told: Any = amqp.Message
            why = told(application_headers={UNREADABLE: f"{type(error).__name__}: {error}"[:200]})
            return handle((kind, channel, payload[:_ABOUT] + why._serialize_properties()))

    return on_frame


def _with_plain_key(payload: bytes) -> bytes:
    """What announces a message, its routing key readable: nobody here looks at that."""
    method = unpack_from(">HH", payload)
    if method == spec.Basic.Deliver:
        at = 4 + 1 + payload[4] + 9  # behind the consumer's tag, the delivery's, and a bit
    elif method == spec.Basic.GetOk:
        at = 4 + 9
    else:
        return payload
    at += 1 + payload[at]  # and the exchange
    begin, end = at + 1, at + 1 + payload[at]
    return payload[:begin] + bytes(min(byte, 127) for byte in payload[begin:end]) + payload[end:]


def fetch(channel: Any, queue: str, most: int, take: Callable[[Any], None]) -> None:
    """Take up to so many messages off a queue for good; each is given to ``take`` as it comes."""
    first = channel.basic_get(queue, no_ack=True)
    if first is None:
        return
    take(first)
    more = min(most - 1, first.delivery_info["message_count"])
    with channel.connection.transport.corked():
        for _ in range(more):
            channel.send_method(spec.Basic.Get, "Bsb", (0, queue, True))
    for _ in range(more):
        told = channel.wait([spec.Basic.GetOk, spec.Basic.GetEmpty], returns_tuple=True)
        if len(told) > 1:
            take(told[-1])


class ChannelLost(Exception):
    """The server closed this channel, or does not answer on it; its connection goes on."""

    def __init__(self, why: str, *, silent: bool = False) -> None:
        super().__init__(why)
        self.silent = silent


class _Channel(amqp.Channel):  # type: ignore[misc]
    """The driver's. Bodies stay as they are: whatever encoding they are said to have, it is their
    consumer's to know.
    """

    is_closing: bool
    on_lost: Callable[[ChannelLost], None] | None = None
    """Set by who keeps it and can do without: called on the link's thread when it is lost, in the
    middle of whatever goes on there. None: what befalls the channel befalls its connection.
    """

    def __init__(self, connection: Any, channel_id: Any = None, on_open: Any = None) -> None:
        super().__init__(connection, channel_id, auto_decode=False, on_open=on_open)

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        """The server closes it. Where no call waits on it, that answers none: raised as what it is
        on another's, it would be taken for the answer to that.
        """
        if self.is_closing:
            # Both have: it answers what was sent here, and waits for this.
            self.send_method(spec.Channel.CloseOk)
            return
        if self.on_lost is None:
            if not self._pending:
                raise ConnectionError(f"the server closed a channel: {reply_text}")
            super()._on_close(reply_code, reply_text, class_id, method_id)
            return
        lost, waited_for = ChannelLost(reply_text), bool(self._pending)
        self.send_method(spec.Channel.CloseOk)
        self.collect()
        self._tell(lost)
        if waited_for:
            raise lost

    def dispatch_method(self, method_sig: Any, payload: Any, content: Any) -> None:
        """As the driver's, which warns of each message that comes while the channel is closed."""
        if not (self.is_closing and method_sig == spec.Basic.Deliver):
            super().dispatch_method(method_sig, payload, content)

    def wait(self, *args: Any, **named: Any) -> Any:
        """As the driver's. Raises `ChannelLost` where the channel is kept and no answer comes."""
        connection = self.connection
        if self.on_lost is None or connection is None or connection.until is not None:
            return super().wait(*args, **named)
        connection.until = until = time.monotonic() + _ANSWER_S
        try:
            return super().wait(*args, **named)
        except TimeoutError:
            if time.monotonic() < until:
                raise  # the network's
            raise self._given_up() from None
        finally:
            connection.until = None

    def _given_up(self) -> ChannelLost:
        """End it without waiting: whatever comes on it until the server has ended it too is not
        looked at.
        """
        lost = ChannelLost(f"no answer within {_ANSWER_S:g} s", silent=True)
        if not self.is_closing:
            self.send_method(spec.Channel.Close, "BsBB", (0, "no answer", 0, 0))
            self.is_closing = True
        self._tell(lost)
        return lost

    def _tell(self, lost: ChannelLost) -> None:
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost(lost)


class BufferedConnection(amqp.Connection):  # type: ignore[misc]
    """The driver's connection, on such a transport."""

    Channel = _Channel
    until: float | None = None
    later: Callable[[Callable[[Any], Any]], Any]
    """Calls this on the link's thread, with the connection of then, when what goes on is done."""
    confirmed: Callable[[int, int, bool], None] | None = None
    """Called with the channel, the tag and whether those before it are meant, in place of what the
    driver does with a confirmation: on whichever thread reads it.
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(frame_handler=_frames, **named)

    def Transport(  # noqa: N802 - the driver's name
        self, host: str, connect_timeout: float, ssl: Any, *more: Any, **named: Any
    ) -> Any:
        """As the driver's, which calls it to connect."""
        names = ("read_timeout", "write_timeout", "socket_settings")
        named |= dict(zip(names, more, strict=False))
        if ssl:
            return BufferedTLS(host, connect_timeout=connect_timeout, ssl=ssl, **named)
        return BufferedTCP(host, connect_timeout=connect_timeout, **named)

    def blocking_read(self, timeout: float | None = None) -> Any:
        """As the driver's; raises `TimeoutError` when ``until`` is over."""
        if self.until is not None:
            timeout = self.until - time.monotonic()
            if timeout <= 0:
                raise TimeoutError
        return super().blocking_read(timeout)

"""Frames taken from a real socket in whatever pieces they come, and writes that are kept back."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.exceptions import UnexpectedFrame

from duly.brokers.rabbitmq import transport
from duly.brokers.rabbitmq.transport import BufferedTCP


def frame(payload: bytes, kind: int = 1, channel: int = 7, end: int = 0xCE) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + bytes([end])


class Ends:
    """A transport, and the socket at its other end."""

    def __init__(self) -> None:
        self.transport = BufferedTCP("nobody:1", connect_timeout=5)
        self.transport.sock, self.server = socket.socketpair()
        self.transport._setup_transport()
        self.transport.connected = True


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.server.close()
    if both.transport.sock is not None:
        both.transport.sock.close()


SENT = [b"", b"a", b"some more", bytes(range(256)) * 3, b"x" * 200_000]
BYTES = b"".join(map(frame, SENT))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 100, 65_536, 65_543, len(BYTES)])
def test_frames_come_whole_whatever_the_pieces(ends: Ends, size: int):
    pieces = [BYTES[at : at + size] for at in range(0, len(BYTES), size)]
    # Of single bytes the first thousand are enough: then all is in the big frame.
    if size < 7:
        pieces = [*pieces[:2000], BYTES[2000 * size :]]

    def send() -> None:
        for piece in pieces:
            ends.server.sendall(piece)

    sender = threading.Thread(target=send)
    sender.start()
    assert [ends.transport.read_frame() for _ in SENT] == [(1, 7, payload) for payload in SENT]
    sender.join()
    assert ends.transport.frame_at_hand() is None


def test_what_came_together_is_at_hand_without_asking_again(ends: Ends):
    ends.server.sendall(frame(b"one") + frame(b"two", kind=8) + frame(b"three")[:-1])
    ends.transport.fill()
    assert ends.transport.frame_at_hand() == (1, 7, b"one")
    assert ends.transport.frame_at_hand() == (8, 7, b"two")
    assert ends.transport.frame_at_hand() is None
    ends.server.sendall(bytes([0xCE]))
    assert ends.transport.read_frame() == (1, 7, b"three")


def test_what_is_no_frame_is_refused(ends: Ends):
    ends.server.sendall(frame(b"one", end=0xCD))
    with pytest.raises(UnexpectedFrame, match="frame_end 0xcd"):
        ends.transport.read_frame()


def test_a_size_that_nobody_sends_is_not_waited_for(ends: Ends):
    ends.server.sendall(b"\x01\x00\x01\xff\xff\xff\xff....")
    with pytest.raises(UnexpectedFrame, match="4,294,967,295 bytes"):
        ends.transport.read_frame()


def test_a_peer_that_is_gone_is_an_error_and_loses_nothing_before(ends: Ends):
    ends.server.sendall(frame(b"last") + b"\x01\x00")
    ends.server.close()
    assert ends.transport.read_frame() == (1, 7, b"last")
    with pytest.raises(OSError, match="closed the connection"):
        ends.transport.read_frame()
    assert not ends.transport.connected


def test_a_time_limit_in_the_middle_of_a_frame_loses_nothing(ends: Ends):
    whole = frame(b"slow")
    ends.server.sendall(whole[:9])
    with pytest.raises(TimeoutError), ends.transport.having_timeout(0.01):
        ends.transport.read_frame()
    assert ends.transport.connected
    ends.server.sendall(whole[9:])
    assert ends.transport.read_frame() == (1, 7, b"slow")


def test_corked_writes_are_sent_in_order_and_together(ends: Ends):
    shared = bytearray(b"first ")
    with ends.transport.corked():
        ends.transport.write(memoryview(shared)[:6])
        # The driver uses its buffer again for the next one.
        shared[:6] = b"second"
        with ends.transport.corked():
            ends.transport.write(memoryview(shared)[:6])
        ends.server.setblocking(False)
        with pytest.raises(BlockingIOError):
            ends.server.recv(100)
    assert ends.server.recv(100) == b"first second"


def test_much_is_sent_before_the_end(ends: Ends):
    received = bytearray()

    def receive() -> None:
        while some := ends.server.recv(1 << 20):
            received.extend(some)

    reader = threading.Thread(target=receive)
    reader.start()
    sent = b"".join(struct.pack(">I", n) * 5000 for n in range(20))
    with ends.transport.corked():
        for at in range(0, len(sent), 20_000):
            ends.transport.write(sent[at : at + 20_000])
    ends.transport.sock.shutdown(socket.SHUT_WR)
    reader.join(30)
    assert bytes(received) == sent


def test_what_was_kept_when_something_fails_is_sent(ends: Ends):
    """Half of a frame left out would be the end of the connection; whole ones may as well go."""

    def fail() -> None:
        with ends.transport.corked():
            ends.transport.write(b"whole")
            raise ValueError("unrelated")

    with pytest.raises(ValueError, match="unrelated"):
        fail()
    assert ends.server.recv(100) == b"whole"


def test_what_the_network_does_not_take_at_once_is_left(ends: Ends):
    """And goes before everything else, whoever sends that."""
    big = bytes(5_000_000)
    ends.transport.offer(big)
    assert ends.transport.is_behind
    ends.transport.offer(b"then")
    received = bytearray()

    def receive() -> None:
        while some := ends.server.recv(1 << 20):
            received.extend(some)

    reader = threading.Thread(target=receive)
    reader.start()
    ends.transport.write(b"the driver's")
    assert not ends.transport.is_behind
    ends.transport.offer(b"at last")
    ends.transport.sock.shutdown(socket.SHUT_WR)
    reader.join(30)
    assert bytes(received) == big + b"then" + b"the driver's" + b"at last"


class Halting:
    """A socket that takes a half at a time, and lets others go first."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._never = threading.Event()

    def send(self, some: bytes, flags: int) -> int:
        sent = self._sock.send(some[: len(some) // 2], flags)
        self._never.wait(0.001)
        return sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_frames_of_many_threads_are_whole_and_in_their_order(ends: Ends):
    ends.transport.sock = Halting(ends.transport.sock)
    sizes, threads = [1, 3000, 20_000] * 20, range(1, 5)

    def offer(number: int) -> None:
        for count, size in enumerate(sizes):
            payload = struct.pack(">I", count) + bytes([number]) * size
            ends.transport.offer(frame(payload, channel=number))

    def send() -> None:
        """As the link's thread does, with the driver's frames between."""
        while any(each.is_alive() for each in offering):
            ends.transport.write(frame(b"", kind=8, channel=0))
        ends.transport.flush()
        ends.transport.sock.shutdown(socket.SHUT_WR)

    offering = [threading.Thread(target=offer, args=(number,)) for number in threads]
    sending = threading.Thread(target=send)
    for each in (*offering, sending):
        each.start()
    reader = BufferedTCP("nobody:1", connect_timeout=5)
    reader.sock = ends.server
    counts = dict.fromkeys(threads, 0)
    while counts != dict.fromkeys(threads, len(sizes)):
        _, channel, payload = reader.read_frame()
        if channel:
            count, size = counts[channel], sizes[counts[channel]]
            assert payload == struct.pack(">I", count) + bytes([channel]) * size
            counts[channel] += 1
    # What is left of the driver's frames, or the other side could not end.
    while ends.server.recv(1 << 20):
        pass
    for each in (*offering, sending):
        each.join(30)
        assert not each.is_alive()


def test_to_a_peer_that_is_gone_nothing_is_offered(ends: Ends):
    ends.transport.close()
    with pytest.raises(OSError, match="closed"):
        ends.transport.offer(b"anything")


def test_a_frame_is_put_back(ends: Ends):
    ends.server.sendall(frame(b"one") + frame(b"two"))
    ends.transport.fill()
    first = ends.transport.frame_at_hand()
    assert first is not None
    ends.transport.put_back(first)
    assert [ends.transport.frame_at_hand() for _ in range(3)] == [first, (1, 7, b"two"), None]


def test_where_nothing_has_come_nothing_is_waited_for(ends: Ends):
    ends.transport.fill_at_hand()
    assert ends.transport.frame_at_hand() is None


def test_properties_that_the_driver_cannot_read_are_told_in_their_place():
    """It would raise, and so end one connection after the other."""
    told: list[tuple[Any, ...]] = []
    far = b"T" + struct.pack(">Q", 1 << 50)  # a time in a header, in the year 35,000,000
    table = b"\x03day" + far
    properties = struct.pack(">HI", 0x2000, len(table)) + table
    announced = (
        struct.pack(">HHB", 60, 60, 1) + b"c" + struct.pack(">QBBB", 1, 0, 0, 2) + b"\xff\xfe"
    )
    on_frame = transport._frames(Counted(), lambda *args: told.append(args))
    on_frame((1, 7, announced))
    on_frame((2, 7, struct.pack(">HHQ", 60, 0, 4) + properties))
    on_frame((3, 7, b"body"))
    [(channel, method, args, message)] = told
    assert (channel, method, message.body) == (7, (60, 60), b"body")
    assert list(message.properties["application_headers"]) == [transport.UNREADABLE]
    assert args[:-2] == announced[:-2]
    assert args[-2:].isascii()


class Counted:
    """What the driver counts frames on."""

    bytes_recv = 0
    confirmed = None

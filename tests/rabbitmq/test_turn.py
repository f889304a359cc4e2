"""Whose turn it is to read: the link's thread's, or for a moment that of a caller who waits."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from duly.brokers.rabbitmq import turn
from duly.brokers.rabbitmq.turn import Turn
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(
    not hasattr(select, "epoll"), reason="what is waited for cannot be changed here"
)
WAIT_S = 30.0


class Waiting:
    """A turn whose link's thread waits, for one thing at a time."""

    def __init__(self, *, lends: bool = True) -> None:
        self.turn = Turn()
        self.near, self.far = socket.socketpair()
        self.waker, self._wake = os.pipe()
        self.turn.begin(self.near, self.waker, lends=lends)
        self.woken: list[set[int]] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def wait(self) -> None:
        """The link's thread begins to wait."""
        self._thread.start()
        eventually(lambda: not self.turn._taken.locked(), "it waits")

    def _run(self) -> None:
        try:
            self.woken.append(self.turn.wait(WAIT_S))
        except ConnectionError as error:
            self.error = error

    def wake(self) -> None:
        os.write(self._wake, b"x")

    def ended(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.turn.end()
        self.near.close()
        self.far.close()
        os.close(self.waker)
        os.close(self._wake)


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    made = Waiting()
    yield made
    made.close()


def test_what_a_caller_reads_does_not_wake_the_links_thread(waiting: Waiting):
    waiting.wait()
    got = b""

    def read(comes: Callable[[float], bool]) -> None:
        nonlocal got
        waiting.far.send(b"an answer")
        assert comes(WAIT_S)
        got = waiting.near.recv(100)

    waiting.turn.borrow(read)
    assert got == b"an answer"
    assert waiting.woken == []
    waiting.wake()
    waiting.ended()
    assert waiting.woken == [{waiting.waker}]


def test_what_a_caller_leaves_wakes_it(waiting: Waiting):
    waiting.wait()
    waiting.turn.borrow(lambda _: waiting.far.sendall(b"left"))
    waiting.ended()
    assert waiting.woken == [{waiting.near.fileno()}]


def test_it_comes_back_after_what_a_caller_raises(waiting: Waiting):
    waiting.wait()

    def interrupted(_: Callable[[float], bool]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiting.turn.borrow(interrupted)
    waiting.far.send(b"next")
    waiting.ended()
    assert waiting.woken == [{waiting.near.fileno()}]


def test_one_has_it_at_a_time(waiting: Waiting):
    read: list[str] = []
    waiting.turn.borrow(lambda _: read.append("while the link's thread is busy"))
    waiting.wait()

    def first(_: Callable[[float], bool]) -> None:
        waiting.turn.borrow(lambda _: read.append("while another reads"))
        read.append("first")
        waiting.wake()
        eventually(lambda: waiting.turn._wanted, "the link's thread wants it back")

    waiting.turn.borrow(first)
    waiting.ended()
    assert read == ["first"]


def test_who_wants_it_back_is_not_outrun(waiting: Waiting):
    """Callers that come one after the other would otherwise be quicker each time."""
    waiting.wait()
    read: list[str] = []

    def first(_: Callable[[float], bool]) -> None:
        waiting.wake()
        eventually(lambda: waiting.turn._wanted, "the link's thread wants it back")
        taken, waiting.turn._taken = waiting.turn._taken, threading.Lock()
        waiting.turn.borrow(lambda _: read.append("second"))
        waiting.turn._taken = taken

    waiting.turn.borrow(first)
    waiting.ended()
    assert read == []


def test_a_turn_that_is_not_given_back_ends_the_connection(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
):
    """Its caller was interrupted between taking it and knowing that it had."""
    monkeypatch.setattr(turn, "_KEPT_S", 0.05)
    waiting.wait()
    lost = waiting.turn._taken
    assert lost.acquire(blocking=False)
    waiting.wake()
    waiting.ended()
    assert isinstance(waiting.error, ConnectionError)
    lost.release()  # too late, and nobody's
    read: list[str] = []
    waiting.turn.borrow(lambda _: read.append("while the link's thread has it"))
    assert read == []


def test_a_connection_that_one_thread_must_use_is_not_lent():
    """TLS has one state for both directions."""
    waiting = Waiting(lends=False)
    waiting.wait()
    read: list[str] = []
    waiting.turn.borrow(lambda _: read.append("not lent"))
    waiting.far.send(b"x")
    waiting.ended()
    assert (read, waiting.woken) == ([], [{waiting.near.fileno()}])
    waiting.close()

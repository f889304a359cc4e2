"""`Turn`: whose turn it is to read from a connection.

Whoever waits for an answer hears it soonest by reading it: to be woken by the thread that reads
costs twice as much as the answer itself. So the link's thread lends its turn to a caller while it
has nothing to do but wait, which it goes on doing for everything save what comes from the server.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from typing import Any

# Only there can what is waited for be changed while somebody waits.
_CAN_LEND = hasattr(select, "epoll")
# Far more than any caller keeps it. One that was interrupted just then has it for ever.
_KEPT_S = 5.0


class Turn:
    """The link's thread has it, but for the time in which it waits for something to come. Then a
    caller may take it: the driver is never used by two at once.
    """

    def __init__(self) -> None:
        self._taken = threading.Lock()
        self._taken.acquire()
        self._wanted = False
        self._watched: _Watched | None = None

    # --- on the link's thread

    def begin(self, sock: Any, waker: int, *, lends: bool) -> None:
        """From now on this connection is waited for; ``waker`` is what others wake by."""
        self._watched = _Watched(sock, waker, lends=lends and _CAN_LEND)

    def end(self) -> None:
        """It is gone."""
        watched, self._watched = self._watched, None
        if watched is not None:
            watched.close()

    def wait(self, seconds: float) -> set[int]:
        """Wait until something comes; which of the two it is. A caller may have read it by then."""
        assert self._watched is not None
        self._taken.release()
        try:
            return self._watched.wait(seconds)
        finally:
            self._take_back()

    def _take_back(self) -> None:
        """Raises `ConnectionError` where a caller does not give it back: what that one has read is
        nobody's, and so the connection cannot go on.
        """
        # Or one caller after the other would be quicker than this thread is woken.
        self._wanted = True
        got = self._taken.acquire(timeout=_KEPT_S)
        self._wanted = False
        if not got:
            self._taken = threading.Lock()
            self._taken.acquire()
            raise ConnectionError("who was reading from the connection does so no more")

    # --- of a caller

    def borrow(self, read: Callable[[Callable[[float], bool]], None]) -> None:
        """Take the turn, where nobody has it, and read. ``read`` is given what waits until
        something comes, for so many seconds at most, and returns soon.
        """
        taken = self._taken
        if not _CAN_LEND or self._wanted or not taken.acquire(blocking=False):
            return
        try:
            watched = self._watched
            if watched is not None and watched.lends:
                watched.hush()
                try:
                    read(watched.comes)
                finally:
                    watched.rouse()
        finally:
            taken.release()


class _Watched:
    def __init__(self, sock: Any, waker: int, *, lends: bool) -> None:
        self.lends = lends
        self._sock = sock.fileno()
        self._both: Any = select.epoll() if lends else select.poll()
        self._come = select.POLLIN
        self._both.register(self._sock, self._come)
        self._both.register(waker, self._come)
        self._alone = select.poll()
        self._alone.register(self._sock, self._come)

    def wait(self, seconds: float) -> set[int]:
        unit = 1 if self.lends else 1000
        return {fd for fd, _ in self._both.poll(seconds * unit)}

    def hush(self) -> None:
        """What comes from the server wakes the link's thread no more."""
        self._both.modify(self._sock, 0)

    def rouse(self) -> None:
        """It does again."""
        self._both.modify(self._sock, self._come)

    def comes(self, seconds: float) -> bool:
        """Wait until something comes from the server."""
        return bool(self._alone.poll(seconds * 1000))

    def close(self) -> None:
        if self.lends:
            self._both.close()

"""Noticing commits to a file: at once those of this process, soon those of others."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable

# How often somebody who waits looks for other processes' commits: half of it is the median
# delay. At 5 ms an idle worker used 1.2 % of a core on one machine and 2.8 % on another, at 8 ms
# up to 2.04 %, at 10 ms up to 2.09 %.
_POLL_S = 0.012


class Changes:
    """A number that moves whenever any process has committed; it may also move without."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        # Held by itself, and not by a condition, whose `with` is Python's: what a signal raises in
        # there leaves it held for ever.
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        self._wanted = threading.Condition(self._lock)
        self._number = 0
        self._waiting = 0
        self._closed = False
        self._poller: threading.Thread | None = None
        self._connection: sqlite3.Connection | None = None
        self._cursor: sqlite3.Cursor | None = None
        self._version = -1

    def number(self) -> int:
        """The number now. Take it before reading, to wait for what the read did not see."""
        with self._lock:
            if self._connection is None and not self._closed:
                # From here on, a commit that the number does not show is one still to be seen.
                self._connection = self._connect()
                self._cursor = self._connection.cursor()
                self._version = self._data_version()
            return self._number

    def notify(self) -> None:
        """This process has committed."""
        with self._lock:
            self._number += 1
            if self._waiting:
                self._moved.notify_all()

    def wait(self, seen: int, timeout_s: float) -> int:
        """The number, once it is not ``seen`` or ``timeout_s`` seconds have passed."""
        with self._lock:
            if self._number == seen and not self._closed:
                self._waiting += 1
                if self._waiting == 1:
                    self._start_polling()
                try:
                    self._moved.wait_for(lambda: self._number != seen or self._closed, timeout_s)
                finally:
                    self._waiting -= 1
            return self._number

    def close(self) -> None:
        """Wake everybody who waits and stop looking."""
        with self._lock:
            self._closed = True
            self._moved.notify_all()
            self._wanted.notify_all()
        if self._poller is not None:
            self._poller.join()
        # The cursor too: SQLite keeps the file open for as long as a statement is there.
        connection, self._connection, self._cursor = self._connection, None, None
        if connection is not None:
            connection.close()

    def _start_polling(self) -> None:
        if self._poller is None:
            self._poller = threading.Thread(target=self._poll, name="duly-changes", daemon=True)
            self._poller.start()
        self._wanted.notify_all()

    def _poll(self) -> None:
        while True:
            with self._lock:
                # Two conditions on one lock: waiting here must not eat a waiter's wake-up.
                self._wanted.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
            # No lock and few calls in here: an idle worker does nothing else.
            while self._waiting and not self._closed:
                version = self._data_version()
                if version != self._version:
                    self._version = version
                    self.notify()
                time.sleep(_POLL_S)

    def _data_version(self) -> int:
        assert self._cursor is not None
        try:
            return self._cursor.execute("pragma data_version").fetchone()[0]  # type: ignore[no-any-return]
        except sqlite3.Error:
            return -1  # it moves: whoever waits finds out by reading

"""A fair turn for the writers of one file, over all threads and processes.

SQLite's busy handler sleeps and tries again, so beside a writer that comes back at once a
second one starves. Writers therefore queue for their turn *before* ``BEGIN IMMEDIATE``, on two
blocking locks beside the file (a turnstile): take ``queue``, take ``turn``, give ``queue``
back; at the end give ``turn`` back. Only the holder of ``queue`` tries for ``turn``, so it is
certainly next, and a writer that has just finished queues behind it.

The locks are flock(2): they belong to an open file, so the threads of one process exclude each
other as processes do, and the kernel frees those of a dead process at once.
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from duly.errors import BrokerUnavailable, ConfigurationError

_TRY = fcntl.LOCK_EX | fcntl.LOCK_NB


class Turn:
    """One writer's place in the queue of a database file; used by one thread at a time.

    ``folder`` is the directory of lock files beside the database, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pid = os.getpid()
        self._queue_fd = _lock_file(folder / "queue.lock")
        try:
            self._turn_fd = _lock_file(folder / "turn.lock")
        except BaseException:
            os.close(self._queue_fd)
            raise
        # Gives the turn to whoever waits next. A call of C's: what a signal raises comes before it
        # or after it, and never in its place.
        self.release: Callable[[], None] = partial(fcntl.flock, self._turn_fd, fcntl.LOCK_UN)
        self._mutex = threading.Lock()
        self._granted = threading.Lock()
        self._granted.acquire()  # released by the helper to say: it is yours
        self._asked: SimpleQueue[bool] | None = None
        self._pending = False
        self._abandoned = False
        self._closed = False
        _turns.add(self)

    def acquire(
        self, timeout_s: float, *, before_waiting: Callable[[], None] = lambda: None
    ) -> None:
        """Wait for the turn, at most ``timeout_s`` seconds. ``before_waiting`` is called where it
        does not come at once.

        Raises `BrokerUnavailable`, naming the holder, when it did not come, and
        `ConfigurationError` in a process forked after this object was made.
        """
        if os.getpid() != self._pid:
            raise ConfigurationError(forked(self._folder))
        try:
            came = not self._pending and self._taken_at_once()
            if not came:
                before_waiting()
                came = self._came_with_help(timeout_s)
        except BaseException:
            self._leave()
            raise
        if not came:
            raise BrokerUnavailable(
                f"{self._folder}: no turn to write within {timeout_s:g} s; {self._holder()} is "
                "writing. Nothing was changed. If that process hangs, end it: its turn is free "
                "at once. If it is only slow, shorten its transactions (batch, tx_s)."
            )

    def close(self) -> None:
        """Leave the queue; a turn that is held is given back."""
        with self._mutex:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            if self._asked is not None:
                self._asked.put(False)
            if not self._pending:
                self._close_files()

    def _taken_at_once(self) -> bool:
        """Both locks without waiting. The queue lock, once taken, is kept: we are next."""
        try:
            fcntl.flock(self._queue_fd, _TRY)
            fcntl.flock(self._turn_fd, _TRY)
        except BlockingIOError:
            return False
        fcntl.flock(self._queue_fd, fcntl.LOCK_UN)
        return True

    def _came_with_help(self, timeout_s: float) -> bool:
        # A blocking flock has no timeout, so a helper thread waits and the caller waits for
        # the helper. What an earlier caller gave up on is still waited for and now is ours.
        with self._mutex:
            self._abandoned = False
            if not self._pending:
                self._pending = True
                try:
                    self._ask_helper()
                except BaseException:  # interrupted: all that come later wait for it
                    self._ask_helper()
                    raise
        if self._granted.acquire(timeout=max(0.0, timeout_s)):
            return True
        with self._mutex:
            # Late, it is left to the helper, unless it came in this very moment.
            self._abandoned = self._pending
            return not self._pending and self._granted.acquire(blocking=False)

    def _leave(self) -> None:
        """Interrupted anywhere in `acquire`: whatever was taken, or is on its way, is others'."""
        with self._mutex:
            if self._pending:
                self._abandoned = True
                return
            self._granted.acquire(blocking=False)
            fcntl.flock(self._queue_fd, fcntl.LOCK_UN)
            self.release()

    def _ask_helper(self) -> None:
        """May be done again, where it did not come to its end."""
        if self._asked is None:
            asked: SimpleQueue[bool] = SimpleQueue()
            threading.Thread(
                target=self._help, args=(asked,), name="duly-turn", daemon=True
            ).start()
            self._asked = asked
        self._asked.put(True)

    def _help(self, asked: SimpleQueue[bool]) -> None:
        while asked.get():
            if not self._pending:
                continue  # asked twice for the same
            fcntl.flock(self._queue_fd, fcntl.LOCK_EX)
            fcntl.flock(self._turn_fd, fcntl.LOCK_EX)
            fcntl.flock(self._queue_fd, fcntl.LOCK_UN)
            with self._mutex:
                self._pending = False
                if self._closed:
                    self._close_files()
                elif self._abandoned:
                    self.release()
                else:
                    self._granted.release()

    def _close_files(self) -> None:
        os.close(self._queue_fd)
        os.close(self._turn_fd)

    def _holder(self) -> str:
        pid = _lock_owner(os.fstat(self._turn_fd).st_ino)
        if pid is None:
            return "another process"
        if pid == os.getpid():
            return f"another thread of this process ({pid})"
        return f"process {pid}{_command(pid)}"

    def _forget_after_fork(self) -> None:
        # The child shares the open files: as long as it had them, the death of its parent
        # would not free the locks. Closing gives up the child's share and nothing else.
        if not self._closed:
            self._close_files()


def forked(path: Path) -> str:
    """What is said to a child that uses what its parent had opened."""
    return (
        f"{path}: opened by the process that this one was forked from. SQLite connections and "
        "locks do not survive fork(): open the App after forking, or close it before, or start "
        "processes by the spawn method."
    )


def _lock_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock_owner(inode: int) -> int | None:
    """The process that holds a flock on this inode, as far as the kernel tells."""
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode start end
        if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            pid = int(fields[4])
            return pid if pid > 0 else None
    return None


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return f" ({b' '.join(words[:4]).decode(errors='replace').strip()[:60]})"


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _forget_all_after_fork() -> None:
    for turn in _turns:
        turn._forget_after_fork()
    _turns.clear()


os.register_at_fork(after_in_child=_forget_all_after_fork)

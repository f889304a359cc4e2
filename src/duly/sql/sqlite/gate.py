"""A gate at which many threads wait, woken one by the other and without the interpreter."""

from __future__ import annotations

import itertools
import os


class Gate:
    """Lets through, once it is opened, everybody who waits there.

    A thread that is released from a lock of its own is woken on another processor, finds the
    interpreter taken, and sleeps again until it is woken a second time. Of those that read from
    one pipe the kernel wakes the first, and whoever has read its byte the next: on the same
    processor, where it runs when the one before it is done. None of it waits for the interpreter,
    so that a thread which computes holds up no link of the chain.

    ``join`` is called, before it is opened, for each who will ``wait``.
    """

    __slots__ = ("_broken", "_leaving", "_read", "_waiting", "_write")

    def __init__(self, read: int, write: int) -> None:
        self._read = read
        self._write = write
        self._broken = False
        self._waiting = 0
        self._leaving = itertools.count(1)

    @classmethod
    def made(cls) -> Gate:
        """A new gate. Raises `OSError` where there are no descriptors left."""
        return cls(*os.pipe())

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)

    def join(self) -> None:
        """Somebody will wait here."""
        self._waiting += 1

    def wait(self) -> bool:
        """Wait until it is open. True for the last to leave, where it can be shut again."""
        os.read(self._read, 1)
        # Counted in one call, which no other thread can come between.
        return next(self._leaving) == self._waiting and not self._broken

    def open(self) -> None:
        """Let everybody through; to be called once."""
        left = self._waiting
        while left:
            left -= os.write(self._write, bytes(left))

    def break_open(self) -> None:
        """Let everybody through, whoever has or has not opened it; it is never shut again."""
        # Once: by each of hundreds it would fill the pipe, and nobody empties it.
        if not self._broken:
            self._broken = True
            self.open()

    def shut(self) -> None:
        """Make it as good as new."""
        self._waiting = 0
        self._leaving = itertools.count(1)

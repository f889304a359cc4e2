"""The worker's half of the socket between a worker and its supervisor.

The worker writes a line of JSON a second: its heartbeat, with what it has done so far. It reads
only one thing, the end of the stream, which means that the supervisor is dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping

FD_VARIABLE = "DULY_LIFELINE_FD"
SLOT_VARIABLE = "DULY_WORKER_SLOT"
"""The place of a worker among its supervisor's, from 0: whoever replaces it has the same."""
BEAT_S = 1.0
# With the supervisor dead, nobody is left to end a worker that hangs in C code and holds the
# interpreter: the kernel does, by a timer that each beat pushes ahead.
LAST_RESORT_BEATS = 60

Counts = Mapping[str, Mapping[str, int]]
"""What was done since the process started: consumer, and how many handled, failed, ..."""


class Lifeline:
    """Tells the supervisor that this process lives, and this process when the supervisor died.

    ``start`` begins the beat on a thread of its own, at once, before anything that may hang: it
    goes on as long as the interpreter runs threads at all. ``ready`` says that work begins.
    """

    def __init__(self, fd: int) -> None:
        # Not for children of handlers: while one held it, the worker would seem to live on.
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._counts: Callable[[], Counts] | None = None

    @classmethod
    def from_environment(cls) -> Lifeline | None:
        """The lifeline this process was started with; None: nobody supervises it."""
        fd = os.environ.pop(FD_VARIABLE, None)
        return None if fd is None else cls(int(fd))

    def start(self, orphaned: Callable[[], None]) -> None:
        """Beat from now on. ``orphaned`` is called once, on the beating thread, when the
        supervisor is gone.
        """
        threading.Thread(
            target=self._beat, args=(orphaned,), name="duly-lifeline", daemon=True
        ).start()

    def ready(self, counts: Callable[[], Counts]) -> None:
        """Say that the worker begins to work, and from now on what it has done.

        Before anything starts that may hang while holding the interpreter.
        """
        self._counts = counts
        self._tell({"ready": True})

    def refuse(self, text: str) -> None:
        """Say why this worker cannot start, and no other could: restarting would not help."""
        self._socket.setblocking(True)
        self._socket.settimeout(5.0)
        with contextlib.suppress(OSError):
            self._socket.sendall(_line({"refused": text}))

    def _beat(self, orphaned: Callable[[], None]) -> None:
        while True:
            _arm_last_resort(BEAT_S * LAST_RESORT_BEATS)
            counts = {} if self._counts is None else self._counts()
            if not self._tell({"counts": counts}) or self._wait_for_end():
                orphaned()
                return

    def _wait_for_end(self) -> bool:
        """Wait out one beat; True as soon as the supervisor is gone."""
        readable, _, _ = select.select([self._socket], [], [], BEAT_S)
        if not readable:
            return False
        try:
            return self._socket.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _tell(self, what: Mapping[str, object]) -> bool:
        """Write a line; False: nobody is there to read it."""
        try:
            self._socket.send(_line(what))
        except BlockingIOError:
            # The supervisor reads nothing just now (stopped, swapped out): work goes on.
            return True
        except OSError:
            return False
        return True


def _line(what: Mapping[str, object]) -> bytes:
    return json.dumps(what).encode() + b"\n"


def _arm_last_resort(seconds: float) -> None:
    # Only while nobody else uses SIGALRM: its default action needs no interpreter to run.
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
        signal.setitimer(signal.ITIMER_REAL, seconds)

"""When to sweep: rarely, and oftener the more there is to delete."""

from __future__ import annotations

import contextlib
import threading

from duly.brokers.sqlite.clock import Clock
from duly.errors import BrokerError, CommitUnknown
from duly.sql import log
from duly.sql.sqlite import DatabaseFile

# A step deletes twice as many as were claimed in between, so it keeps up and catches up.
_CLAIMED = 2_500
# Where it found nothing to delete, the next waits for twice as many, up to so many times.
_PATIENCE = 8
_IDLE_S = 1.0
_NOTHING_FOUND_S = 10.0


class Sweeper:
    """Runs retention for a broker, from the threads of its lanes."""

    def __init__(self, file: DatabaseFile, clock: Clock) -> None:
        self._file = file
        self._clock = clock
        self._broom = log.Broom()
        self._mutex = threading.Lock()
        self._claimed = 0
        self._patience = 1
        self._next_s = 0.0

    def claimed(self, count: int) -> None:
        """Messages were claimed: as many will be over soon."""
        self._claimed += count
        if self._claimed >= _CLAIMED * self._patience:
            self._sweep()

    def idle(self) -> None:
        """A lane has nothing to do."""
        if self._clock.monotonic_s() >= self._next_s:
            self._sweep()

    def _sweep(self) -> None:
        if not self._mutex.acquire(blocking=False):
            return
        try:
            self._claimed = 0
            now_ms = self._clock.wall_ms()
            deleted = 0
            # A lane that has just claimed calls this: what fails here must not cost it its claim.
            with contextlib.suppress(BrokerError, CommitUnknown):
                deleted = self._file.write(lambda: log.sweep(self._broom, now_ms), durable=False)
            self._patience = 1 if deleted else min(self._patience * 2, _PATIENCE)
            pause_s = _IDLE_S if deleted else _NOTHING_FOUND_S
            self._next_s = self._clock.monotonic_s() + pause_s
        finally:
            self._mutex.release()

"""When to sweep: rarely, and oftener the more there is to delete."""

from __future__ import annotations

import contextlib
import threading

from duly.brokers.postgres.clock import Clock
from duly.errors import BrokerError, CommitUnknown
from duly.sql import log
from duly.sql.postgres import Database
from duly.sql.steps import Ask, Steps

# A step deletes a quarter more than were claimed in between, so it keeps up and catches up. What it
# looks at besides costs as much as 2,000 messages, and nobody but its lane waits for it.
_CLAIMED = 8_000
_STEP = 10_000
_IDLE_S = 1.0
_NOTHING_FOUND_S = 10.0
# What claims and ticks leave behind goes more rarely: to find it costs a walk over what is dead.
_TIDY_S = 10.0
_RUNS = 5_000


class Sweeper:
    """Runs retention for a broker, from the threads of its lanes."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._broom = log.Broom(most=_STEP)
        self._mutex = threading.Lock()
        self._claimed = 0
        self._next_s = 0.0
        self._tidy_s = 0.0

    def claimed(self, count: int) -> None:
        """Messages were claimed: as many will be over soon."""
        self._claimed += count
        if self._claimed >= _CLAIMED:
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
            now_s, now_ms = self._clock.monotonic_s(), self._clock.wall_ms()
            tidy = now_s >= self._tidy_s
            self._next_s = now_s + _NOTHING_FOUND_S
            # A lane that has just claimed calls this: what fails here must not cost it its claim.
            with contextlib.suppress(BrokerError, CommitUnknown):
                if self._database.write(lambda: self._steps(now_ms, tidy), durable=False):
                    self._next_s = now_s + _IDLE_S
            if tidy:
                self._tidy_s = now_s + _TIDY_S
        finally:
            self._mutex.release()

    def _steps(self, now_ms: int, tidy: bool) -> Steps[int]:
        [(mine,)] = yield Ask("lock_retention")
        if not mine:
            return 0  # another process is at it
        deleted = yield from log.sweep(self._broom, now_ms)
        if tidy:
            yield Ask("forget_cursors")
            for stream, _ in (yield Ask("all_streams")):
                [(end,)] = yield Ask("low_water", (stream,))
                yield Ask("forget_runs", (stream, end, _RUNS))
        return deleted

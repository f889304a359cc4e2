"""The time that the broker goes by: the server's, for workers on many hosts have many clocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from duly.inspection.health import Finding
from duly.sql import log, looking
from duly.sql.postgres import Database
from duly.sql.steps import Ask, Steps

# How far this machine's clock may run away from the server's between two looks: 30 s of what
# quartz does is a millisecond.
_LOOK_EVERY_S = 30.0

SERVER = "server"
"""Whose clock leases go by, where SQLite notes which start of the machine."""


@dataclass(frozen=True, slots=True)
class Clock:
    """``wall_ms`` tells due times and ages, ``lease_ms`` leases and how long retries wait (no
    step of a clock moves it), ``monotonic_s`` how long something waits in this process.
    """

    wall_ms: Callable[[], int]
    lease_ms: Callable[[], int]
    monotonic_s: Callable[[], float] = time.monotonic


class ServerClock:
    """The server's clock, told from this machine's own between two looks.

    A step of the server's clock moves ``wall_ms`` and not ``lease_ms``. By how much the one is
    ahead of the other stands in the database (`StepWatch`), so that a worker that starts
    afterwards goes by the same.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._mutex = threading.Lock()
        self._wall_ahead_ms, self._looked_s = self._measured()
        self._lease_ahead_ms = self._wall_ahead_ms - database.read(_known_ms)

    def clock(self) -> Clock:
        """As what the broker goes by."""
        return Clock(self.wall_ms, self.lease_ms)

    def wall_ms(self) -> int:
        """Milliseconds since 1970 UTC, by the server."""
        return int(_local_ms() + self._wall_ahead_ms)

    def lease_ms(self) -> int:
        """The same without the steps that the server's clock has made since the log began."""
        return int(_local_ms() + self._lease_ahead_ms)

    def look(self) -> None:
        """Compare the clocks again, now and then. Raises `BrokerError`."""
        if time.monotonic() - self._looked_s < _LOOK_EVERY_S:
            return
        with self._mutex:
            ahead_ms, self._looked_s = self._measured()
            moved_ms = ahead_ms - self._wall_ahead_ms
            self._wall_ahead_ms = ahead_ms
            if abs(moved_ms) <= log.STEP_MS:
                self._lease_ahead_ms += moved_ms

    def _measured(self) -> tuple[float, float]:
        """By how much the server's clock is ahead of this machine's, and when that was."""
        before_ms = _local_ms()
        server_ms = self._database.read(_server_ms)
        return server_ms - (before_ms + _local_ms()) / 2, time.monotonic()


class StepWatch:
    """Notices steps of the wall clock, by which retries would wait too long or not at all."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._followed_ms: int | None = None

    def follow(self) -> None:
        """Shift what waits for a retry, where the clock was stepped and nobody has done so."""
        ahead_ms = self._clock.wall_ms() - self._clock.lease_ms()
        known_ms = self._followed_ms
        if known_ms is None or abs(ahead_ms - known_ms) > log.STEP_MS:
            self._database.write(lambda: log.follow_clock(SERVER, ahead_ms))
            self._followed_ms = ahead_ms

    def findings(self) -> Steps[list[Finding]]:
        """What the server's clock did since a lane last looked, and whether messages are of a time
        that has not come; only reads.
        """
        now_ms = self._clock.wall_ms()
        found: list[Finding] = []
        for _, known_ms in (yield Ask("followed_offset")):
            step_ms = now_ms - self._clock.lease_ms() - known_ms
            if abs(step_ms) > log.STEP_MS:
                said = f"the server's stepped by {step_ms / 1000:+,.1f} s since a worker looked"
                remedy = "Keep its clock in step (NTP); retries follow it at the next claim."
                found.append(Finding("warning", "clock", said, remedy))
        found += yield from looking.made_ahead(now_ms)
        return found or [Finding("ok", "clock", "in step")]


def _server_ms() -> Steps[int]:
    [(ms,)] = yield Ask("server_ms")
    return int(ms)


def _known_ms() -> Steps[int]:
    [(_, ms)] = yield Ask("followed_offset")
    return int(ms)


# It goes on while the machine sleeps, where there is one that does.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _local_ms() -> float:
    return time.clock_gettime_ns(_CLOCK) / 1e6

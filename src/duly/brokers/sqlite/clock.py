"""The clocks that the broker goes by; tests bring their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from duly.message import now_ms
from duly.sql import log
from duly.sql.sqlite import DatabaseFile, boot_id, boot_ms
from duly.sql.steps import Steps


@dataclass(frozen=True, slots=True)
class Clock:
    """``wall_ms`` tells due times and ages, ``boot_ms`` and ``boot_id`` leases (no clock step
    moves them), ``monotonic_s`` how long something waits in this process.
    """

    wall_ms: Callable[[], int] = now_ms
    boot_ms: Callable[[], int] = boot_ms
    boot_id: Callable[[], str] = boot_id
    monotonic_s: Callable[[], float] = monotonic


class StepWatch:
    """Notices steps of the wall clock, by which retries would wait too long or not at all."""

    def __init__(self, file: DatabaseFile, clock: Clock) -> None:
        self._file = file
        self._clock = clock
        self._offset_ms: int | None = None

    def look(self) -> None:
        """Compare the clocks; costs two readings as long as nothing was stepped."""
        offset_ms = self._clock.wall_ms() - self._clock.boot_ms()
        if self._offset_ms is None or abs(offset_ms - self._offset_ms) > log.STEP_MS:
            self._offset_ms = self._file.write(self.follow, durable=False)

    def follow(self) -> Steps[int]:
        """Shift what waits, where the clock was stepped; returns by how much it is ahead.

        The clocks are read within the transaction: who read them before, and then waited for
        the file's turn (or stood still), would follow a clock of the past.
        """
        offset_ms = self._clock.wall_ms() - self._clock.boot_ms()
        yield from log.follow_clock(self._clock.boot_id(), offset_ms)
        return offset_ms

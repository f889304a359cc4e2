"""The clocks that the broker goes by; tests bring their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from duly.inspection.health import Finding
from duly.message import now_ms
from duly.sql import log, looking
from duly.sql.sqlite import boot_id, boot_ms
from duly.sql.steps import Ask, Steps


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
    """Notices steps of the wall clock, by which retries would wait too long or not at all.

    What was followed last stands in the file and nowhere else: any process, and any transaction
    that notes a retry, may have followed another step meanwhile.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def is_followed(self) -> Steps[bool]:
        """Whether nothing is to be shifted; only reads."""
        return (yield from log.is_followed(self._clock.boot_id(), self._offset_ms()))

    def follow(self) -> Steps[int]:
        """Shift what waits, where the clock was stepped; returns the wall clock's time by which
        a retry is to be noted.

        The clocks are read within the transaction: who read them before, and then waited for
        the file's turn (or stood still), would follow a clock of the past. And once: a retry
        noted by a clock that was stepped meanwhile would be shifted by a step it has made.
        """
        now_ms = self._clock.wall_ms()
        yield from log.follow_clock(self._clock.boot_id(), now_ms - self._clock.boot_ms())
        return now_ms

    def findings(self) -> Steps[list[Finding]]:
        """What the wall clock did since a lane last looked, and whether messages are of a time
        that has not come; only reads.
        """
        now_ms = self._clock.wall_ms()
        found: list[Finding] = []
        for boot, offset_ms in (yield Ask("known_offset")):
            step_ms = self._offset_ms() - offset_ms
            if boot == self._clock.boot_id() and abs(step_ms) > log.STEP_MS:
                said = f"stepped by {step_ms / 1000:+,.1f} s since a worker last looked"
                remedy = "Keep the clock in step (NTP); retries follow it at the next claim."
                found.append(Finding("warning", "clock", said, remedy))
        found += yield from looking.made_ahead(now_ms)
        return found or [Finding("ok", "clock", "in step")]

    def _offset_ms(self) -> int:
        return self._clock.wall_ms() - self._clock.boot_ms()

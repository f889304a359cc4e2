"""The worker to itself: what an accused message needs, so that its next death has one culprit.

A message is *accused* when its worker died while it was alone in its claim, but not alone in the
worker: any of the messages that were there may have been the cause, so nobody was charged. It is
given out only to a lane whose worker holds nothing else. The lanes of a process see to that among
themselves: one closes the door, and the others claim nothing until it opens again.

Nothing rests on the door but that it comes to a verdict: who is charged is decided by what the
dead worker held (`duly.sql.settling.take_over`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

# How long the door stays closed, the first time, for a lane that waits until the others have
# ended what they hold. In vain, it waits twice as long the next time.
FIRST_PATIENCE_S = 1.0


class Solitude:
    """The door between the lanes of one process. ``clock`` gives seconds.

    It is closed for a subscription, any lane of which may then claim the accused message, and
    stays closed for the lane that did, until that comes back. It is closed to others at most half
    of the time: when somebody was turned away, it stays open afterwards for as long as it was
    closed. Safe to use from any thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._opened = threading.Condition()
        self._for: int | None = None
        self._runs: object | None = None
        self._closed_s = 0.0
        self._open_until_s = float("-inf")
        self._patience_s = FIRST_PATIENCE_S
        self._turned_away = False

    @property
    def is_closed(self) -> bool:
        """Whether anybody has closed the door."""
        return self._for is not None

    @property
    def is_run(self) -> bool:
        """Whether the door is closed for a message that was claimed."""
        return self._runs is not None

    @property
    def stays_s(self) -> float:
        """For how many seconds it stays as it is, if nothing happens: closed, until patience is
        lost; or open, because others were turned away before. 0: it may change at any time.
        """
        with self._opened:
            if self._for is not None and not self.is_run:
                return max(0.001, self._closed_s + self._patience_s - self._clock())
            return max(0.0, self._open_until_s - self._clock())

    def is_closed_to(self, subscription_no: int) -> bool:
        """Whether lanes of this subscription must claim nothing now."""
        if not self.is_closed:  # nearly always, and without the lock
            return False
        with self._opened:
            self._lose_patience()
            away = self.is_closed and (self._for != subscription_no or self.is_run)
            self._turned_away = self._turned_away or away
            return away

    def is_closed_for(self, subscription_no: int) -> bool:
        """Whether lanes of this subscription may claim an accused message, and no other."""
        if self._for is None:
            return False
        with self._opened:
            self._lose_patience()
            return self._for == subscription_no and not self.is_run

    def close(self, subscription_no: int) -> None:
        """Close the door, if it may be closed, where an accused message is known to wait."""
        with self._opened:
            self._lose_patience()
            if self._for is None and self._clock() >= self._open_until_s:
                self._for, self._closed_s = subscription_no, self._clock()

    def run(self, subscription_no: int, lane: object) -> None:
        """This lane has claimed the accused message: the door stays closed while it runs."""
        with self._opened:
            if self._for == subscription_no:
                self._runs, self._patience_s = lane, FIRST_PATIENCE_S

    def end(self, lane: object) -> None:
        """What this lane had claimed has ended; opens the door, if it was closed for that."""
        if self._runs is lane:
            with self._opened:
                self._open(self._clock())

    def end_lost(self) -> None:
        """The claim that the door was closed for is over, whatever its lane does."""
        with self._opened:
            if self.is_run:
                self._open(self._clock())

    def open(self, subscription_no: int) -> None:
        """No accused message of this subscription waits any more."""
        with self._opened:
            if self._for == subscription_no and not self.is_run:
                self._open(self._clock())

    def give_up(self) -> None:
        """No accused message waits, whosever the door was closed for."""
        with self._opened:
            if self._for is not None and not self.is_run:
                self._open(self._clock())

    def wait(self, timeout_s: float) -> None:
        """Wait until the door opens, or so many seconds."""
        with self._opened:
            self._opened.wait(timeout_s)

    def _lose_patience(self) -> None:
        lost_s = self._closed_s + self._patience_s
        if self._for is None or self.is_run or self._clock() < lost_s:
            return
        # Its own lanes were turned away too, of all that they could have claimed.
        self._turned_away = True
        self._patience_s *= 2
        self._open(lost_s)

    def _open(self, since_s: float) -> None:
        if self._turned_away:
            self._open_until_s = since_s + (since_s - self._closed_s)
        self._for, self._runs, self._turned_away = None, None, False
        self._opened.notify_all()

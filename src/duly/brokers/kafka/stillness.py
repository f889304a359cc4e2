"""`Stillness`: whether a thread has stood still, as that of a process which was stopped does."""

from __future__ import annotations

import time

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Stillness:
    """Counts seconds since the thread was heard of, also those in which the machine slept;
    ``most_s`` are none to speak of.
    """

    def __init__(self, most_s: float) -> None:
        self.most_s = most_s
        self._heard_s = _now_s()

    def hear(self) -> bool:
        """The thread runs. Whether it had stood still."""
        now_s = _now_s()
        before_s, self._heard_s = self._heard_s, now_s
        return now_s - before_s > self.most_s

    def __bool__(self) -> bool:
        """Whether it stands still now, or has and was not heard of since."""
        return _now_s() - self._heard_s > self.most_s


def _now_s() -> float:
    return time.clock_gettime(_CLOCK)

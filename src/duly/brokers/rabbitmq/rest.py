"""`Rest`: how long a queue that answers nothing is left alone."""

from __future__ import annotations

import math
import time

_RESTS_S = (1.0, 60.0)


class Rest:
    """A queue that has answered nothing is asked again after a while, and after longer each time:
    all others wait meanwhile. One whose server has just started answers soon.
    """

    def __init__(self) -> None:
        self._until = -math.inf
        self._next_s = _RESTS_S[0]

    def begin(self) -> None:
        """It did not answer."""
        self._until = time.monotonic() + self._next_s
        self._next_s = min(2 * self._next_s, _RESTS_S[1])

    def end(self) -> None:
        """It did."""
        self._next_s = _RESTS_S[0]

    @property
    def is_over(self) -> bool:
        """Whether it is to be asked."""
        return time.monotonic() >= self._until

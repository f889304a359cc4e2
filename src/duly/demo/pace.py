"""`Pace`: keeps publishing, working and killing in step, however fast the machine is.

The run is cut into one slice more than there are kills. Before each kill the killer waits until
as many slices have been handled as it has had turns; when it begins to aim, the next slice is
published, and while it aims, bit by bit. So there is fresh work at every kill, and the kills are
spread over the whole run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

# Between two bits of a slice while the killer aims.
BIT_S = 0.03


class Pace:
    """What the publisher and the killer tell each other."""

    def __init__(self, kills: int) -> None:
        self.kills = kills
        self._turns = 0
        self._waiting = False
        self._aiming = False
        self._over = False
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The killer looks for another victim: give it one more slice of work to look at."""
        with self._changed:
            self._turns += 1
            self._aiming = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._aiming = False
                self._changed.notify_all()

    def let_go(self) -> None:
        """There will be no more kills: publish the rest."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_for_slice(self, number: int) -> None:
        """Wait until this slice (0 to ``kills``) may be published."""
        with self._changed:
            self._waiting = True
            self._changed.wait_for(lambda: self._over or number <= self._turns)
            self._waiting = False

    def wait_a_bit(self) -> None:
        """After a bit of a slice: while the killer aims, the rest is worth keeping."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self._aiming, BIT_S)

    @property
    def is_dry(self) -> bool:
        """Whether all that may be published by now is."""
        return self._waiting

    def share_before(self, kill: int) -> float:
        """How much of everything is to be handled before this kill."""
        return kill / (self.kills + 1)


def slices(total: int, count: int) -> list[range]:
    """The numbers 0 to ``total`` in ``count`` pieces of about the same length."""
    bounds = [total * each // count for each in range(count + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]

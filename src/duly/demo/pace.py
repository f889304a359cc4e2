"""`Pace`: keeps publishing, working and killing in step, however fast the machine is.

The run is cut into one slice more than there are kills. The publisher stays at most one slice
ahead of the killer, and the killer waits until as many slices have been handled as workers
were killed. So there is work at every kill, and the kills are spread over the whole run.
"""

from __future__ import annotations

import threading
from itertools import pairwise


class Pace:
    """What the publisher and the killer tell each other."""

    def __init__(self, kills: int) -> None:
        self.kills = kills
        self._turns = 0
        self._over = False
        self._changed = threading.Condition()

    def note_turn(self) -> None:
        """The killer had its turn: one more worker was killed, or none was to be found."""
        with self._changed:
            self._turns += 1
            self._changed.notify_all()

    def let_go(self) -> None:
        """There will be no more kills: publish the rest."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_for_slice(self, number: int) -> None:
        """Wait until this slice (0 to ``kills``) may be published."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or number <= self._turns + 1)

    def share_before(self, kill: int) -> float:
        """How much of everything is to be handled before this kill."""
        return kill / (self.kills + 1)


def slices(total: int, count: int) -> list[range]:
    """The numbers 0 to ``total`` in ``count`` pieces of about the same length."""
    bounds = [total * each // count for each in range(count + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]

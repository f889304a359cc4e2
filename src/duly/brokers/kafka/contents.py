"""`Contents`: what was fetched of one partition and is not settled."""

from __future__ import annotations

from duly.brokers.kafka.item import Item
from duly.brokers.kafka.notes import REACH
from duly.brokers.kafka.runs import Runs


class Contents:
    """Items by offset, those of them that are ``claimed``, and runs. ``next`` is the first offset
    that was not fetched, ``size`` the bytes of all bodies.
    """

    def __init__(self, position: int) -> None:
        self.next = position
        self.items: dict[int, Item] = {}
        self.claimed: dict[int, Item] = {}
        self.runs = Runs()
        self.size = 0

    @property
    def position(self) -> int:
        """All before it is settled."""
        item = next(iter(self.items), self.next)
        run = self.runs.first
        return item if run is None else min(item, run)

    @property
    def count(self) -> int:
        """How many messages are not settled."""
        return len(self.items) + self.runs.count

    @property
    def held(self) -> int:
        """How many are claimed."""
        return len(self.claimed) + self.runs.held

    @property
    def ready(self) -> int:
        """How many messages nobody has claimed, though some of them may have to wait."""
        return self.count - self.held

    @property
    def is_held(self) -> bool:
        """Whether anything of it is claimed."""
        return bool(self.claimed) or bool(self.runs.held)

    @property
    def is_full(self) -> bool:
        """Whether no more should be fetched."""
        return self.count >= 2 * REACH

    @property
    def is_half_full(self) -> bool:
        """Whether to wait before more is fetched."""
        return self.count >= REACH

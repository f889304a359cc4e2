"""`Extent`: which offsets of a partition somebody may have started."""

from __future__ import annotations

from typing import NamedTuple

START = -1
"""In place of a first offset: from the position on, wherever that stands by then."""


class Extent(NamedTuple):
    """Offsets from ``first`` to before ``end``; none, where that is not behind it."""

    first: int
    end: int

    def covers(self, offset: int) -> bool:
        """Whether this offset is one of them."""
        return self.first <= offset < self.end

    def within(self, other: Extent) -> bool:
        """Whether all of them are among those of the other."""
        return self.end <= self.first or (other.first <= self.first and self.end <= other.end)

    def __and__(self, other: Extent) -> Extent:
        """What both cover."""
        return Extent(max(self.first, other.first), min(self.end, other.end))

    def __or__(self, other: Extent) -> Extent:
        """What either covers, and what stands between."""
        if other.end <= other.first:
            return self
        if self.end <= self.first:
            return other
        return Extent(min(self.first, other.first), max(self.end, other.end))


NOWHERE = Extent(0, 0)

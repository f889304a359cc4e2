"""`Lines`: what of one partition is in order with what.

In order by key each key is a line. Where a subscription's partitions are cut into lanes of keys,
each of these is one, whose messages take effect one after the other, as those of a whole partition
do otherwise: it is a log of its own to who admits by cursor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from duly.brokers.kafka.item import Item, Order, State
from duly.message import key_lane_of


@dataclass(slots=True)
class _Line:
    """The unsettled items of one line, by offset."""

    offsets: list[int] = field(default_factory=list)
    claimed: int = 0


class Lines:
    """Nothing of a line is claimed beside another of it, but behind it in the same claim. What is
    of none may be claimed beside anything. ``lanes``: how many there are, in order by them.
    """

    def __init__(self, order: Order, lanes: int) -> None:
        self._order = order
        self._lanes = lanes
        self._lines: dict[str, _Line] = {}

    def add(self, item: Item) -> None:
        """This one was fetched."""
        item.line = self._line_of(item)
        if item.line is not None:
            self._lines.setdefault(item.line, _Line()).offsets.append(item.offset)

    def _line_of(self, item: Item) -> str | None:
        if item.message is None or not self._order.is_in_lines:
            return None
        if self._order is Order.BY_KEY:
            return item.message.key
        return str(key_lane_of(item.message, item.offset, self._lanes))

    def log_of(self, item: Item, partition: str) -> str:
        """The log that it stands in for a cursor, given the name of its partition's."""
        is_cut = self._order is Order.BY_LANE
        return f"{partition}#{item.line}/{self._lanes}" if is_cut else partition

    def a_claim(self, claimers: int) -> int:
        """Of how many lines a claim takes that leaves some for each of so many."""
        return max(1, -(-len(self._lines) // max(1, claimers)))

    def is_free(self, line: str | None) -> bool:
        """Whether nothing of it is claimed."""
        there = None if line is None else self._lines.get(line)
        return there is None or not there.claimed

    def may_start(self, item: Item, lined: Mapping[str, int]) -> bool:
        """Whether it may be claimed beside what ``lined`` counts, by line, of this claim."""
        if item.line is None:
            return True
        line, ahead = self._lines[item.line], lined.get(item.line, 0)
        return line.claimed == ahead and line.offsets[ahead] == item.offset

    def take(self, item: Item, lined: dict[str, int]) -> int | None:
        """It is claimed; the offset of the one that this claim may take behind it."""
        if item.line is None:
            return None
        line = self._lines[item.line]
        line.claimed += 1
        ahead = lined[item.line] = lined.get(item.line, 0) + 1
        return line.offsets[ahead] if line.claimed == ahead < len(line.offsets) else None

    def let_go(self, item: Item, *, gone: bool) -> None:
        """Its claim is over; ``gone``: it is settled."""
        if item.line is None:
            return
        line = self._lines[item.line]
        line.claimed -= item.state is State.CLAIMED
        if gone:
            line.offsets.remove(item.offset)
            if not line.offsets:
                del self._lines[item.line]

    def head_beside(self, item: Item) -> int | None:
        """The first of its line, where none of that is claimed."""
        if item.line is None:
            return None
        line = self._lines.get(item.line)
        return line.offsets[0] if line is not None and not line.claimed else None

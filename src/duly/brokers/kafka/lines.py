"""`Lines`: what of one partition is in order by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from duly.brokers.kafka.item import Item, State


@dataclass(slots=True)
class _Line:
    """The unsettled items of one key, by offset."""

    offsets: list[int] = field(default_factory=list)
    claimed: int = 0


class Lines:
    """Nothing of a key is claimed beside another of it, but behind it in the same claim.
    ``in_order``: whether there is such an order; else, and without a key, anything may be.
    """

    def __init__(self, *, in_order: bool) -> None:
        self._in_order = in_order
        self._lines: dict[str, _Line] = {}

    def add(self, item: Item) -> None:
        """This one was fetched."""
        if self._in_order and item.key is not None:
            self._lines.setdefault(item.key, _Line()).offsets.append(item.offset)

    def may_start(self, item: Item, lined: Mapping[str, int]) -> bool:
        """Whether it may be claimed beside what ``lined`` counts, by key, of this claim."""
        if not self._in_order or item.key is None:
            return True
        line, ahead = self._lines[item.key], lined.get(item.key, 0)
        return line.claimed == ahead and line.offsets[ahead] == item.offset

    def take(self, item: Item, lined: dict[str, int]) -> int | None:
        """It is claimed; the offset of the one that this claim may take behind it."""
        if not self._in_order or item.key is None:
            return None
        line = self._lines[item.key]
        line.claimed += 1
        ahead = lined[item.key] = lined.get(item.key, 0) + 1
        return line.offsets[ahead] if line.claimed == ahead < len(line.offsets) else None

    def let_go(self, item: Item, *, gone: bool) -> None:
        """Its claim is over; ``gone``: it is settled."""
        if not self._in_order or item.key is None:
            return
        line = self._lines[item.key]
        line.claimed -= item.state is State.CLAIMED
        if gone:
            line.offsets.remove(item.offset)
            if not line.offsets:
                del self._lines[item.key]

    def head_beside(self, item: Item) -> int | None:
        """The first of its key, where none of that is claimed."""
        if not self._in_order or item.key is None:
            return None
        line = self._lines.get(item.key)
        return line.offsets[0] if line is not None and not line.claimed else None

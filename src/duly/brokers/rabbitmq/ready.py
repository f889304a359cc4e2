"""`Ready`: what was delivered to a process and claimed by nobody, and how much more may come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duly.brokers.rabbitmq.intake import Item

# How much of a subscription's bodies one process has ready, unless one claim asks for more.
BYTES_AHEAD = 64 * 1024 * 1024
MOST_AHEAD = 20_000
# Of those before the first, of which nobody knows how large they are.
_UNSEEN_BYTES = 1024 * 1024


class Ready:
    """Items in the order delivered, and their bytes. It is locked by whoever has it.

    A server delivers so many messages, however large they are. So their mean size is reckoned, of
    many and of the newest few; and where there is too much, or what may yet come is likely to be
    far too much, it `is_full`: the server is to be told to stop.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.is_full = False
        self._items: deque[Item] = deque()
        self._room = BYTES_AHEAD
        self._seen = 0
        self._mean = 0.0
        self._newest_mean = 0.0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    @property
    def first(self) -> Item:
        """The next to be claimed."""
        return self._items[0]

    def come(self, item: Item, credit: int) -> bool:
        """This one was delivered, and so many more may be on their way; whether it is full now."""
        size = len(item.body)
        self._items.append(item)
        self.bytes += size
        self._seen = min(self._seen + 1, 100)
        self._mean += (size - self._mean) / self._seen
        self._newest_mean += (size - self._newest_mean) / 10
        likely = self.bytes + credit * self._newest_mean
        filled = not self.is_full and (self.bytes > self._room or likely > 2 * self._room)
        self.is_full |= filled
        return filled

    def give_back(self, item: Item) -> None:
        """Before all others."""
        self._items.appendleft(item)
        self.bytes += len(item.body)

    def pop(self) -> Item:
        """The next, which is somebody's now."""
        item = self._items.popleft()
        self.bytes -= len(item.body)
        return item

    def pop_older(self, came_s: float) -> list[Item]:
        """Those in front that came before this time."""
        found = []
        while self._items and self._items[0].came_s < came_s:
            found.append(self.pop())
        return found

    def clear(self) -> None:
        """All of it comes again, here or elsewhere."""
        self._items.clear()
        self.bytes = 0
        self.is_full = False

    def has_room(self, max_bytes: int) -> bool:
        """Whether more is to come; where a claim may take more at once, there is room for that."""
        self._room = max(BYTES_AHEAD, max_bytes)
        if self.is_full and 2 * self.bytes <= self._room:
            self.is_full = False
            # They have become larger: many of them will be as the newest.
            self._mean = max(self._mean, self._newest_mean)
        return not self.is_full

    def more(self, wanted: int) -> int | None:
        """How many more there is room for, by what they are likely to be; None: for all that are
        wanted to be ready.
        """
        size = self._mean if self._seen else _UNSEEN_BYTES
        # Half of it: what is reckoned is often exceeded.
        fit = int((self._room / 2 - self.bytes) / max(1.0, size)) + 1
        return None if len(self) + fit >= min(wanted, MOST_AHEAD) else max(1, fit)

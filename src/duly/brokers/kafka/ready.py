"""`Ready`: what of one partition may be claimed, in the order of offsets, and what waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from heapq import heappop, heappush, nsmallest

from duly.brokers.kafka.item import Item, State


class Ready:
    """Of the items in ``there``, by offset. What is no longer ready when its turn comes is passed
    over; what comes back stands in its place again.
    """

    def __init__(self, there: Mapping[int, Item]) -> None:
        self._there = there
        self._fresh: deque[Item] = deque()
        self._back: list[tuple[int, Item]] = []
        self._waiting: list[tuple[float, int, Item]] = []

    def fetched(self, item: Item) -> None:
        """This one came behind all others."""
        self._fresh.append(item)

    def offer(self, item: Item) -> None:
        """This one may be claimed again."""
        heappush(self._back, (item.offset, item))

    def wait(self, item: Item) -> None:
        """This one may be claimed when it is due."""
        heappush(self._waiting, (item.due, item.offset, item))

    def due(self, now: float) -> Iterator[Item]:
        """Those that wait no longer."""
        while self._waiting and self._waiting[0][0] <= now:
            due, _, item = heappop(self._waiting)
            if item.due == due and item.state is State.WAITING:
                yield item

    def next_due(self) -> float | None:
        """When something comes due."""
        return self._waiting[0][0] if self._waiting else None

    def waits_before(self, offset: int) -> bool:
        """Whether one waits that stands before this offset."""
        return any(each.state is State.WAITING and o < offset for _, o, each in self._waiting)

    def peek(self) -> Item | None:
        """The first of them."""
        while self._back and not self._is_ready(self._back[0][1]):
            heappop(self._back)
        while self._fresh and not self._is_ready(self._fresh[0]):
            self._fresh.popleft()
        if self._back and (not self._fresh or self._back[0][0] < self._fresh[0].offset):
            return self._back[0][1]
        return self._fresh[0] if self._fresh else None

    def drop(self) -> None:
        """Take off the first."""
        if self._back and (not self._fresh or self._back[0][0] < self._fresh[0].offset):
            heappop(self._back)
        else:
            self._fresh.popleft()

    def ahead(self, count: int) -> list[int]:
        """The offsets of the next so many."""
        ready = [item.offset for item, _ in zip(self._fresh, range(count), strict=False)]
        if self._back:
            back = [offset for offset, _ in nsmallest(count, self._back)]
            ready = sorted([*ready, *back])[:count]
        return ready

    def _is_ready(self, item: Item) -> bool:
        return item.state is State.READY and self._there.get(item.offset) is item

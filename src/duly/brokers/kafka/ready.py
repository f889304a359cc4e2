"""`Ready`: what of one partition may be claimed, in the order of offsets, and what waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heappop, heappush, nsmallest

from duly.brokers.kafka.item import Item, State

_NONE: dict[str, int] = {}


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

    def peek(self, lined: dict[str, int] = _NONE, lanes: int = 1) -> Item | None:  # noqa: ARG002
        """The first of them, whatever this claim has by now."""
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

    def ahead(self, count: int) -> tuple[int, int]:
        """The last offset of the next so many (-1: there are none), and how many there are."""
        ready = [item.offset for item, _ in zip(self._fresh, range(count), strict=False)]
        if self._back:
            back = [offset for offset, _ in nsmallest(count, self._back)]
            ready = sorted([*ready, *back])[:count]
        return max(ready, default=-1), len(ready)

    def _is_ready(self, item: Item) -> bool:
        return item.state is State.READY and self._there.get(item.offset) is item


class ReadyByLane(Ready):
    """The same where a partition is cut into lanes of keys, each of which has a queue. A claim goes
    on with the lane that it began with: the fewer it takes of, the more are left for those beside
    it. ``is_free``: whether nothing of a lane is claimed.
    """

    def __init__(self, there: Mapping[int, Item], is_free: Callable[[str | None], bool]) -> None:
        super().__init__(there)
        self._is_free = is_free
        self._queues: dict[str | None, Ready] = {}
        self._peeked: Ready = self

    def _queue(self, item: Item) -> Ready:
        if item.line not in self._queues:
            self._queues[item.line] = Ready(self._there)
        return self._queues[item.line]

    def fetched(self, item: Item) -> None:
        """As `Ready.fetched`."""
        self._queue(item).fetched(item)

    def offer(self, item: Item) -> None:
        """As `Ready.offer`."""
        self._queue(item).offer(item)

    def peek(self, lined: dict[str, int] = _NONE, lanes: int = 1) -> Item | None:
        """The first of the lane that ``lined`` has last; of another, where it has less than so many
        ``lanes``.
        """
        mine = (None, next(reversed(lined), None))
        found = self._first([line for line in mine if line in self._queues])
        if found is None and len(lined) < lanes:
            others = [line for line in self._queues if line not in lined and self._is_free(line)]
            found = self._first(others)
        return found

    def _first(self, lines: Iterable[str | None]) -> Item | None:
        found: Item | None = None
        for line in lines:
            item = self._queues[line].peek()
            if item is not None and (found is None or item.offset < found.offset):
                found, self._peeked = item, self._queues[line]
        return found

    def drop(self) -> None:
        """Take off what was peeked at last."""
        self._peeked.drop()

    def ahead(self, count: int) -> tuple[int, int]:
        """As `Ready.ahead`, of whichever lane: which one a claim takes of depends on what is held
        by then.
        """
        each = [queue.ahead(count) for queue in self._queues.values()]
        return max([last for last, _ in each], default=-1), min(count, sum(n for _, n in each))

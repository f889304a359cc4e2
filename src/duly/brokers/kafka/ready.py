"""`Ready`: what of one partition may be claimed, in the order of offsets, and what waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heappop, heappush, nsmallest

from duly.brokers.kafka.item import Item, State

_NONE: Mapping[str, int] = {}


class _Queue:
    """Of the items in ``there``, by offset. What is no longer ready when its turn comes is passed
    over; what comes back stands in its place again.
    """

    def __init__(self, there: Mapping[int, Item]) -> None:
        self._there = there
        self.fresh: deque[Item] = deque()
        self._back: list[tuple[int, Item]] = []

    def __len__(self) -> int:
        return len(self.fresh) + len(self._back)

    def offer(self, item: Item) -> None:
        heappush(self._back, (item.offset, item))

    def peek(self) -> Item | None:
        while self._back and not self._is_ready(self._back[0][1]):
            heappop(self._back)
        while self.fresh and not self._is_ready(self.fresh[0]):
            self.fresh.popleft()
        if self._back and (not self.fresh or self._back[0][0] < self.fresh[0].offset):
            return self._back[0][1]
        return self.fresh[0] if self.fresh else None

    def drop(self) -> None:
        if self._back and (not self.fresh or self._back[0][0] < self.fresh[0].offset):
            heappop(self._back)
        else:
            self.fresh.popleft()

    def last_of(self, count: int) -> int:
        """The last offset of the next so many (-1: there are none)."""
        if not self._back:
            return self.fresh[min(count, len(self.fresh)) - 1].offset if self.fresh else -1
        ready = [item.offset for item, _ in zip(self.fresh, range(count), strict=False)]
        back = [offset for offset, _ in nsmallest(count, self._back)]
        return sorted([*ready, *back])[:count][-1]

    def _is_ready(self, item: Item) -> bool:
        return item.state is State.READY and self._there.get(item.offset) is item


class Ready:
    """All of a partition is one queue."""

    def __init__(self, there: Mapping[int, Item]) -> None:
        self._queue = _Queue(there)
        self._waiting: list[tuple[float, int, Item]] = []

    def queue_of(self, item: Item) -> _Queue:  # noqa: ARG002 - there is one
        """Where it stands."""
        return self._queue

    def fetched(self, item: Item) -> None:
        """This one came behind all others."""
        self.queue_of(item).fresh.append(item)

    def offer(self, item: Item) -> None:
        """This one may be claimed again."""
        self.queue_of(item).offer(item)

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

    def peek(self, _lined: Mapping[str, int] = _NONE, _lanes: int = 1, /) -> Item | None:
        """The first of them, whatever this claim has by now."""
        return self._queue.peek()

    def drop(self) -> None:
        """Take off what was peeked at last."""
        self._queue.drop()

    def ahead(self, count: int) -> tuple[int, int]:
        """The last offset of the next so many (-1: there are none), and how many there are."""
        return self._queue.last_of(count), min(count, len(self._queue))


class ReadyByLane(Ready):
    """The same where a partition is cut into lanes of keys, each of which is a queue. A claim takes
    of so many of them only: the others are left for those beside it. ``is_free``: whether nothing
    of a lane is claimed.
    """

    def __init__(self, there: Mapping[int, Item], is_free: Callable[[str | None], bool]) -> None:
        super().__init__(there)
        self._there = there
        self._is_free = is_free
        self._queues: dict[str | None, _Queue] = {}
        self._peeked = self._queue
        self._lanes = 1

    def queue_of(self, item: Item) -> _Queue:
        """That of its lane; what is of none, for nobody can read it, has one, too."""
        if item.line not in self._queues:
            self._queues[item.line] = _Queue(self._there)
        return self._queues[item.line]

    def peek(self, lined: Mapping[str, int] = _NONE, lanes: int = 1, /) -> Item | None:
        """The first of the lanes that ``lined`` has, and of others where it has less than so many
        ``lanes``.
        """
        self._lanes = lanes
        if len(lined) >= lanes:
            return self._first(lined)
        return self._first(each for each in self._queues if each in lined or self._is_free(each))

    def _first(self, lines: Iterable[str | None]) -> Item | None:
        found: Item | None = None
        for line in lines:
            item = self._queues[line].peek() if line in self._queues else None
            if item is not None and (found is None or item.offset < found.offset):
                found, self._peeked = item, self._queues[line]
        return found

    def drop(self) -> None:
        """Take off what was peeked at last."""
        self._peeked.drop()

    def ahead(self, count: int) -> tuple[int, int]:
        """As `Ready.ahead`, of whichever lanes, for which of them a claim takes of depends on what
        is held by then: of each as many as where they have the same.
        """
        each = -(-count // self._lanes)
        last = max([queue.last_of(each) for queue in self._queues.values()], default=-1)
        return last, min(count, sum(map(len, self._queues.values())))

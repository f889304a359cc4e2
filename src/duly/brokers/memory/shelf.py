"""Where a broker in memory keeps the messages of one topic until everybody is done with them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from duly.broker import Start
from duly.message import Message


@dataclass(slots=True, eq=False)
class Record:
    """One stored message. ``waiting`` counts the subscriptions that are not done with it."""

    index: int
    position: int
    message: Message[Any]
    stored_ms: int
    waiting: int


class Shelf:
    """The kept messages of one topic, by index: 0, 1, 2, ... in the order stored.

    A message leaves ``retention_s`` after the last subscription was done with it. One that no
    subscription ever waited for stays: the first subscription begins with it.
    """

    def __init__(self, retention_s: float) -> None:
        self._retention_s = retention_s
        self._records: dict[int, Record] = {}
        self._leaving: deque[tuple[float, int]] = deque()
        self.end = 0

    def append(
        self,
        message: Message[Any],
        *,
        position: int,
        stored_ms: int,
        waiting: int,
    ) -> None:
        """Store one message at the end."""
        self._records[self.end] = Record(self.end, position, message, stored_ms, waiting)
        self.end += 1

    def after(self, index: int) -> Record | None:
        """The first kept message at or behind ``index``."""
        while index < self.end:
            record = self._records.get(index)
            if record is not None:
                return record
            index += 1
        return None

    def enter(self, start: Start) -> int:
        """Where a new subscription begins; all from there wait for it from now on."""
        first = self._first(start)
        for index in range(first, self.end):
            if index in self._records:
                self._records[index].waiting += 1
        return first

    def _first(self, start: Start) -> int:
        if start == "latest":
            return self.end
        oldest = next(iter(self._records), self.end)
        if not isinstance(start, datetime):
            return oldest
        start_ms = int(start.timestamp() * 1000)
        later = (i for i, record in self._records.items() if record.stored_ms >= start_ms)
        return next(later, self.end)

    def done(self, record: Record, now: float) -> None:
        """One subscription is done with a message."""
        record.waiting -= 1
        if record.waiting == 0:
            self._leaving.append((now, record.index))
        while self._leaving and self._leaving[0][0] <= now - self._retention_s:
            index = self._leaving.popleft()[1]
            # A subscription made meanwhile may wait for it again, and will end here itself.
            if index in self._records and self._records[index].waiting == 0:
                del self._records[index]

    def count_from(self, index: int) -> int:
        """How many messages are kept from an index on."""
        return sum(i in self._records for i in range(index, self.end))

    def __len__(self) -> int:
        return len(self._records)

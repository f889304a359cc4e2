"""One partition of a log in memory: messages by offset, with gaps, and its history of epochs."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from duly.broker import Start
from duly.message import Message, key_lane_of


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored message."""

    offset: int
    epoch: int
    message: Message[Any]
    stored_ms: int


class Partition:
    """An append-only part of a topic. ``log`` names this incarnation of it."""

    def __init__(self, log: str, topic: str, number: int, retention_s: float) -> None:
        self.log = log
        self.topic = topic
        self.number = number
        self.end = 0
        self.epoch = 0
        self._retention_s = retention_s
        self._entries: list[Entry] = []
        self._leaving: deque[tuple[float, int]] = deque()

    @property
    def whole(self) -> Partition:
        """Itself: it is not cut."""
        return self

    def truncated(self) -> None:
        """It lost its end, and knows it."""

    def append(self, message: Message[Any], stored_ms: int) -> None:
        """Store one message at the end."""
        self._entries.append(Entry(self.end, self.epoch, message, stored_ms))
        self.end += 1

    def after(self, offset: int) -> Entry | None:
        """The first message at or behind an offset."""
        place = self._place(offset)
        return self._entries[place] if place < len(self._entries) else None

    def at(self, offset: int) -> Entry | None:
        """The message at an offset; None in a gap."""
        entry = self.after(offset)
        return entry if entry is not None and entry.offset == offset else None

    def count_from(self, offset: int) -> int:
        """How many messages there are from an offset on."""
        return len(self._entries) - self._place(offset)

    def first(self, start: Start) -> int:
        """The offset at which a new subscription begins."""
        if start == "latest":
            return self.end
        wanted_ms = int(start.timestamp() * 1000) if isinstance(start, datetime) else 0
        later = (entry.offset for entry in self._entries if entry.stored_ms >= wanted_ms)
        return next(later, self.end)

    def skip(self, count: int) -> None:
        """Leave a gap, as transaction markers and compaction do."""
        self.end += count

    def truncate(self, offset: int) -> None:
        """Lose what stands at and behind an offset, as an unclean change of leader does."""
        del self._entries[self._place(offset) :]
        self.end = offset
        self.epoch += 1

    def committed(self, offset: int, now: float) -> None:
        """Every subscription is done with what stands before an offset: it may go."""
        if not self._leaving or self._leaving[-1][1] < offset:
            self._leaving.append((now, offset))
        while self._leaving and self._leaving[0][0] <= now - self._retention_s:
            del self._entries[: self._place(self._leaving.popleft()[1])]

    def _place(self, offset: int) -> int:
        return bisect_left(self._entries, offset, key=lambda entry: entry.offset)


class KeyLanes:
    """A partition cut into lanes of keys: which offsets are of which."""

    def __init__(self, whole: Partition, lanes: int) -> None:
        self.whole = whole
        self.lanes = lanes
        self._offsets: list[list[int]] = [[] for _ in range(lanes)]
        self._to = 0

    def offsets(self, number: int) -> Sequence[int]:
        """Those of one lane, in order; some may have left the log, or been lost to it."""
        entry = self.whole.after(self._to)
        while entry is not None:
            lane = key_lane_of(entry.message, entry.offset, self.lanes)
            self._offsets[lane].append(entry.offset)
            self._to = entry.offset + 1
            entry = self.whole.after(self._to)
        return self._offsets[number]

    def truncated(self) -> None:
        """The partition lost its end."""
        self._to = min(self._to, self.whole.end)
        for offsets in self._offsets:
            del offsets[bisect_left(offsets, self._to) :]


class KeyLane:
    """One lane of keys of a partition, as a log of its own."""

    def __init__(self, cut: KeyLanes, number: int) -> None:
        self.whole = cut.whole
        self.log = f"{cut.whole.log}#{number}/{cut.lanes}"
        self.topic = cut.whole.topic
        self._cut = cut
        self._number = number

    @property
    def end(self) -> int:
        """As `Partition.end`."""
        return self.whole.end

    def after(self, offset: int) -> Entry | None:
        """The first message of this lane at or behind an offset."""
        offsets = self._cut.offsets(self._number)
        for at in range(bisect_left(offsets, offset), len(offsets)):
            if (entry := self.whole.at(offsets[at])) is not None:
                return entry
        return None

    def at(self, offset: int) -> Entry | None:
        """As `Partition.at`."""
        return self.whole.at(offset)

    def count_from(self, offset: int) -> int:
        """How many messages of this lane there are from an offset on."""
        offsets = self._cut.offsets(self._number)
        return len(offsets) - bisect_left(offsets, offset)

    def truncated(self) -> None:
        """The partition lost its end."""
        self._cut.truncated()

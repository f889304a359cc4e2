"""`Share`: one partition as the process that is assigned it works it.

What was fetched is an `Item` until it is settled. The position, which is committed, stands before
the first that is not; `duly.brokers.kafka.notes` says what is committed beside it. Nothing here
locks or talks to a server: the intake's lock guards it all.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from duly.brokers.kafka.notes import MOST, REACH, Known, Notes
from duly.message import Message, Topic


class Order(enum.Enum):
    """What may be claimed beside what. ``NONE``: anything. ``BY_KEY``: nothing of a key that is
    claimed or waits. ``AS_LOGGED``: nothing beside anything, as a cursor needs it.
    """

    NONE = "none"
    BY_KEY = "by key"
    AS_LOGGED = "as logged"


class State(enum.Enum):
    """Where an item is."""

    READY = "ready"
    BLOCKED = "blocked"
    WAITING = "waiting"
    CLAIMED = "claimed"


class Item:
    """A fetched record that is not settled. ``wrong``: why it is no message that duly carries;
    ``noted``: what is known of it has to be committed, for the record does not say it.
    """

    __slots__ = (
        *("alone", "body", "charged", "declared", "due", "epoch", "lane", "message", "noted"),
        *("offset", "record", "repeated", "replays", "settling", "state", "suspect", "token"),
        *("until", "wrong"),
    )

    def __init__(self, declared: Topic[Any], offset: int, epoch: int, body: bytes) -> None:
        self.declared = declared
        self.offset = offset
        self.epoch = epoch
        self.body = body
        self.message: Message[Any] | None = None
        self.record: Any = None
        self.wrong: str | None = None
        self.charged = 0
        self.replays = 0
        self.repeated = self.suspect = self.alone = self.settling = self.noted = False
        self.due = 0.0
        self.state = State.READY
        self.token = self.lane = 0
        self.until = 0.0

    @property
    def key(self) -> str | None:
        """What it is in order with."""
        return None if self.message is None else self.message.key

    def is_late(self, now: float) -> bool:
        """Whether its lease is over, and nobody is settling it."""
        return self.token != 0 and self.until <= now and not self.settling


@dataclass(slots=True)
class _Line:
    """The unsettled items of one key, by offset."""

    offsets: list[int] = field(default_factory=list)
    claimed: int = 0


class Share:
    """``position`` is where the notes were found, ``order`` what its subscription asks for.

    ``generation`` is given to one assignment of one partition, and never again.
    """

    def __init__(
        self,
        name: tuple[str, int],
        log: str,
        generation: int,
        order: Order,
        position: int,
        notes: Notes,
    ) -> None:
        self.name = name
        self.log = log
        self.generation = generation
        self.order = order
        self.next = position
        self.items: dict[int, Item] = {}
        self.claimed: dict[int, Item] = {}
        self.size = 0
        self.announced = notes.suspects
        # Counts changes, and those of them that are committed.
        self.version = self.committed = 0
        # The position that the group has, as far as is known.
        self.safe = position
        self.leaving = False  # its process gives it up
        self._done = set(notes.done)
        self._begun = notes
        self._fresh: deque[Item] = deque()
        self._back: list[tuple[int, Item]] = []
        self._suspects: list[int] = []
        self._waiting: list[tuple[float, int, Item]] = []
        self._lines: dict[str, _Line] = {}
        self._noted: dict[int, Item] = {}

    # --- what was fetched

    def feed(self, item: Item, due: float | None) -> None:
        """Take the next record. ``due``: when it may be claimed, by the clock of leases."""
        offset = item.offset
        self.next = max(self.next, offset + 1)
        if offset in self._done:
            return
        begun = self._begun
        known = begun.known.pop(offset, None)
        if known is not None:
            item.charged = max(item.charged, known.charged)
            item.repeated |= known.repeated
            self.note(item)
        item.suspect = offset < begun.suspects
        item.repeated |= item.suspect or offset < begun.repeated
        self.items[offset] = item
        self.size += len(item.body)
        if self.order is Order.BY_KEY and item.key is not None:
            self._lines.setdefault(item.key, _Line()).offsets.append(offset)
        if due is not None:
            self.wait(item, due)
        elif item.suspect:
            heappush(self._suspects, offset)
        else:
            self._fresh.append(item)

    def due_ms(self, offset: int) -> int:
        """When this one may be tried again, by the wall clock of who noted it; 0: at once."""
        known = self._begun.known.get(offset)
        return 0 if known is None else known.due_ms

    def reached(self, offset: int) -> None:
        """Nothing more stands before this offset: records of the log's own were passed over."""
        if offset > self.next:
            self.next = offset
            self.version += not self.items

    @property
    def position(self) -> int:
        """All before it is settled."""
        return next(iter(self.items), self.next)

    @property
    def is_full(self) -> bool:
        """Whether no more should be fetched."""
        return len(self.items) >= REACH

    @property
    def is_half_full(self) -> bool:
        """Whether to wait before more is fetched."""
        return len(self.items) >= REACH // 2

    # --- claiming

    def suspect(self) -> Item | None:
        """The next of those that somebody may have died with, where it may be claimed now."""
        while self._suspects:
            item = self.items.get(self._suspects[0])
            if item is None or item.state is not State.READY or not item.suspect:
                heappop(self._suspects)
                continue
            if not self._may_start(item, {}):
                if self.order is Order.BY_KEY:
                    heappop(self._suspects)
                    item.state = State.BLOCKED
                    continue
                return None
            return item
        return None

    def next_ready(self, now: float, lined: dict[str, int]) -> Item | None:
        """The next item that may be claimed beside what ``lined`` counts, by key, of this claim;
        it is not taken off yet.
        """
        self._wake(now)
        while (item := self._peek()) is not None:
            if item.suspect:
                self._drop()
                heappush(self._suspects, item.offset)
            elif len(self._noted) >= MOST and not item.noted:
                return None
            elif self._may_start(item, lined):
                return item
            elif self.order is Order.BY_KEY and item.offset < self.position + REACH:
                self._drop()
                item.state = State.BLOCKED
            else:
                return None
        return None

    def _peek(self) -> Item | None:
        while self._back and not _is_ready(self, self._back[0][1]):
            heappop(self._back)
        while self._fresh and not _is_ready(self, self._fresh[0]):
            self._fresh.popleft()
        if self._back and (not self._fresh or self._back[0][0] < self._fresh[0].offset):
            return self._back[0][1]
        return self._fresh[0] if self._fresh else None

    def _drop(self) -> None:
        if self._back and (not self._fresh or self._back[0][0] < self._fresh[0].offset):
            heappop(self._back)
        else:
            self._fresh.popleft()

    def _may_start(self, item: Item, lined: dict[str, int]) -> bool:
        if self.leaving or item.offset >= self.position + REACH:
            return False
        if self.order is Order.AS_LOGGED:
            taken = lined.get("", 0)
            return len(self.claimed) == taken and self._is_next(item, taken)
        if self.order is Order.BY_KEY and item.key is not None:
            line = self._lines[item.key]
            ahead = lined.get(item.key, 0)
            return line.claimed == ahead and line.offsets[ahead] == item.offset
        return True

    def _is_next(self, item: Item, taken: int) -> bool:
        """Whether all before it is settled, or claimed by this same claim."""
        if not taken:
            return item.offset == self.position
        waits = any(each.state is State.WAITING and o < item.offset for _, o, each in self._waiting)
        return not waits and not (self._suspects and self._suspects[0] < item.offset)

    def take(self, item: Item, lined: dict[str, int]) -> None:
        """Claim it."""
        if not item.suspect:
            self._drop()
        item.state = State.CLAIMED
        self.claimed[item.offset] = item
        if self.order is Order.AS_LOGGED:
            lined[""] = lined.get("", 0) + 1
        elif self.order is Order.BY_KEY and item.key is not None:
            line = self._lines[item.key]
            line.claimed += 1
            ahead = lined[item.key] = lined.get(item.key, 0) + 1
            self._unblock(line, ahead)

    def _unblock(self, line: _Line, ahead: int) -> None:
        if line.claimed == ahead < len(line.offsets):
            item = self.items[line.offsets[ahead]]
            if item.state is State.BLOCKED:
                self._offer(item)

    def _offer(self, item: Item) -> None:
        item.state = State.READY
        if item.suspect:
            heappush(self._suspects, item.offset)
        else:
            heappush(self._back, (item.offset, item))

    def _wake(self, now: float) -> None:
        while self._waiting and self._waiting[0][0] <= now:
            due, _, item = heappop(self._waiting)
            if item.due == due and item.state is State.WAITING:
                self._offer(item)

    def next_due(self) -> float | None:
        """When something comes due."""
        return self._waiting[0][0] if self._waiting else None

    # --- how a claim ends

    def done(self, item: Item) -> None:
        """Settled."""
        self._let_go(item, gone=True)
        del self.items[item.offset]
        self._noted.pop(item.offset, None)
        self.size -= len(item.body)
        self._done.add(item.offset)
        self.version += 1

    def back(self, item: Item) -> None:
        """Not settled: it may be claimed again at once."""
        self._let_go(item, gone=False)
        self._offer(item)
        self._unblock_first(item)
        self.version += 1

    def wait(self, item: Item, due: float) -> None:
        """Not settled: it may be claimed again then."""
        if item.state is State.CLAIMED:
            self._let_go(item, gone=False)
        item.state, item.due = State.WAITING, due
        heappush(self._waiting, (due, item.offset, item))
        self._unblock_first(item)
        self.version += 1

    def _let_go(self, item: Item, *, gone: bool) -> None:
        self.claimed.pop(item.offset, None)
        if self.order is Order.BY_KEY and item.key is not None:
            line = self._lines[item.key]
            line.claimed -= item.state is State.CLAIMED
            if gone:
                line.offsets.remove(item.offset)
                if not line.offsets:
                    del self._lines[item.key]
                else:
                    self._unblock(line, 0)
        item.alone = item.settling = False
        item.token = 0

    def _unblock_first(self, item: Item) -> None:
        if self.order is Order.BY_KEY and item.key is not None:
            self._unblock(self._lines[item.key], 0)

    def give_up(self, item: Item) -> None:
        """Not settled, though it may have run: whoever has it next is told."""
        item.repeated = True
        self._begun.repeated = max(self._begun.repeated, item.offset + 1)
        self.back(item)

    # --- what is committed

    def note(self, item: Item) -> None:
        """From now on what is known of it is committed, for the record does not say it."""
        item.noted = True
        self._noted[item.offset] = item

    def notes(self, wall_ms: int, now: float, *, leaving: bool = False) -> Notes:
        """What to commit beside the position. ``leaving``: nobody works it any more, and nobody
        died.
        """
        position, begun = self.position, self._begun
        self._done = {offset for offset in self._done if offset >= position}
        known = {offset: each for offset, each in begun.known.items() if offset >= self.next}
        for offset, item in self._noted.items():
            waits = item.state is State.WAITING and item.due > now
            due_ms = wall_ms + int((item.due - now) * 1000) if waits else 0
            known[offset] = Known(item.charged, item.repeated, due_ms)
        claimed = max(self.claimed, default=-1) + 1
        if not leaving:
            claimed = max(claimed, self._last_suspect())
        # Of what was not fetched yet no more is known than before.
        suspects = begun.suspects if begun.suspects > self.next else 0
        if leaving:
            begun.repeated = max(begun.repeated, claimed)
        else:
            suspects = max(suspects, claimed, self.announced)
        return Notes(begun.topic, suspects, begun.repeated, set(self._done), known)

    def foresee(self, count: int) -> None:
        """Announce what a claim of so many would take next, to spare it a commit of its own."""
        ready = [item.offset for item, _ in zip(self._fresh, range(count), strict=False)]
        self.announced = max([*self.claimed, *ready], default=-1) + 1

    def _last_suspect(self) -> int:
        offsets = (offset for offset in self._suspects if offset in self.items)
        return max((o for o in offsets if self.items[o].suspect), default=-1) + 1


def _is_ready(share: Share, item: Item) -> bool:
    return item.state is State.READY and share.items.get(item.offset) is item

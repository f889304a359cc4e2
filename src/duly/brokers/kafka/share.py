"""`Share`: one partition as the process that is assigned it works it.

What was fetched is an `Item`, or one of a `Run`, until it is settled. The position, which is
committed, stands before the first that is not; `duly.brokers.kafka.notes` says what is committed
beside it. Nothing here locks or talks to a server: the intake's lock guards it all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, nsmallest

from duly.brokers.kafka.item import Item, Order, State
from duly.brokers.kafka.notes import MOST, REACH, Foretold, Known, Notes
from duly.brokers.kafka.runs import Claim, Run, Runs
from duly.brokers.kafka.telling import Telling

__all__ = ["Item", "Order", "Share", "State"]


# So far behind where the log's end was met last, more will follow.
_FAR = 1000


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
        self.runs = Runs()
        self.size = 0
        # Before this offset somebody may be about to start what is there.
        self.announced = notes.suspects
        self.telling = Telling(notes.suspects)
        # Counts changes, and those of them that are committed.
        # The last one that the group may have without anybody having been told is ``doubtful``.
        self.version = self.committed = self.doubtful = 0
        # The position that the group has, as far as is known.
        self.safe = position
        self.leaving = False  # its process gives it up
        # How many the last claim has taken of it, where nothing is claimed beside it.
        self._latest = 0
        # Part of a transaction that is not over: nothing else may commit a position of it.
        self.busy = False
        # Where the log's end was met last; not beyond it, until then.
        self._end = position
        self._done = set(notes.done)
        self._begun = notes
        # From here on nothing is known of a message that is fetched.
        self._known_to = max(
            *(notes.suspects, notes.repeated, max(notes.done, default=-1) + 1),
            max(notes.known, default=-1) + 1,
        )
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

    def feed_run(self, run: Run) -> bool:
        """Take the next records together; False where something may be known of one of them, or
        where some were taken before: they are to be given one by one.
        """
        if run.first < max(self.next, self._known_to):
            return False
        self.next = run.last + 1
        self.runs.add(run)
        self.size += run.size
        return True

    def left_ms(self, offset: int, wall_ms: int) -> int:
        """How long this one has to wait until it may be tried again, by what was noted of it."""
        known = self._begun.known.get(offset)
        return 0 if known is None else self._begun.left_ms(known.due_ms, wall_ms)

    def reached(self, offset: int) -> None:
        """Nothing more stands before this offset: records of the log's own were passed over."""
        self._end = max(self._end, offset)
        if offset > self.next:
            self.next = offset
            self.version += not self.count

    @property
    def position(self) -> int:
        """All before it is settled."""
        item = next(iter(self.items), self.next)
        run = self.runs.first
        return item if run is None else min(item, run)

    @property
    def count(self) -> int:
        """How many messages are not settled."""
        return len(self.items) + self.runs.count

    @property
    def ready(self) -> int:
        """How many messages nobody has claimed, though some of them may have to wait."""
        return self.count - self._held

    @property
    def is_held(self) -> bool:
        """Whether anything of it is claimed."""
        return bool(self.claimed) or bool(self.runs.held)

    @property
    def is_full(self) -> bool:
        """Whether no more should be fetched."""
        return self.count >= 2 * REACH

    @property
    def is_half_full(self) -> bool:
        """Whether to wait before more is fetched."""
        return self.count >= REACH

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
            return self._held == taken and self._is_next(item, taken)
        if self.order is Order.BY_KEY and item.key is not None:
            line = self._lines[item.key]
            ahead = lined.get(item.key, 0)
            return line.claimed == ahead and line.offsets[ahead] == item.offset
        return True

    def _is_next(self, item: Item, taken: int) -> bool:
        """Whether all before it is settled, or claimed by this same claim."""
        if not taken:
            return item.offset == self.position
        run = self.runs.head()
        if run is not None and run.first < item.offset:
            return False
        waits = any(each.state is State.WAITING and o < item.offset for _, o, each in self._waiting)
        return not waits and not (self._suspects and self._suspects[0] < item.offset)

    @property
    def _held(self) -> int:
        return len(self.claimed) + self.runs.held

    def next_run(self, now: float, lined: dict[str, int]) -> Run | None:
        """The next run of which something may be claimed beside what ``lined`` counts of this
        claim, where no item comes before it. It is not claimed yet.
        """
        self._wake(now)
        run, limit = self.runs.head(), self.position + REACH
        if run is None or self.leaving or run.first >= limit or len(self._noted) >= MOST:
            return None
        if self.order is Order.AS_LOGGED:
            before = next(iter(self.items), run.first) < run.first
            if before or self._held != lined.get("", 0):
                return None
        elif (item := self._peek()) is not None and item.offset < run.first:
            return None
        return run

    def within_reach(self, run: Run) -> int:
        """How many of its first may be claimed, by how far that is behind the position."""
        return run.before(self.position + REACH)

    def take_run(self, run: Run, count: int, lined: dict[str, int], claim: Claim) -> None:
        """Claim the first ``count`` of a run, for a lane, until then."""
        self.runs.take(run, count, claim)
        self._latest = lined[""] = lined.get("", 0) + count

    def open(self, run: Run, *, suspect: bool = False) -> None:
        """Keep the records of a run one by one from now on, claimed as they are."""
        self.runs.remove(run)
        items = {item.offset: item for item in run.items()}
        # In the order of offsets: the first is the position.
        self.items = dict(sorted({**self.items, **items}.items()))
        for item in items.values():
            item.suspect = suspect
            if item.token:
                item.state = State.CLAIMED
                self.claimed[item.offset] = item
            else:
                self._offer(item)

    def take(self, item: Item, lined: dict[str, int]) -> None:
        """Claim it."""
        if not item.suspect:
            self._drop()
        item.state = State.CLAIMED
        self.claimed[item.offset] = item
        if self.order is Order.AS_LOGGED:
            self._latest = lined[""] = lined.get("", 0) + 1
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

    def done_run(self, run: Run) -> None:
        """All of it is settled."""
        self.runs.remove(run)
        self.size -= run.size
        if self.position <= run.last:
            self._done.update(run.offsets)
        self.version += 1

    def back_run(self, run: Run, *, started: bool = False) -> None:
        """None of it is settled: it may be claimed again at once. ``started``: perhaps some ran,
        and whoever has it next is told.
        """
        self.runs.back(run)
        if started:
            run.repeated = True
            self._begun.repeated = max(self._begun.repeated, run.last + 1)
        self.version += 1

    def suspect_run(self, run: Run) -> None:
        """Its lease is over: who held it may hang, and with which of them nobody knows."""
        self.runs.back(run)
        run.repeated = True
        self.open(run, suspect=True)
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
        known: dict[int, Known] = {}
        for offset, each in begun.known.items():
            if offset >= self.next:
                left_ms = begun.left_ms(each.due_ms, wall_ms)
                due_ms = wall_ms + left_ms if left_ms else 0
                known[offset] = Known(each.charged, each.repeated, due_ms)
        for offset, item in self._noted.items():
            waits = item.state is State.WAITING and item.due > now
            due_ms = wall_ms + int((item.due - now) * 1000) if waits else 0
            known[offset] = Known(item.charged, item.repeated, due_ms)
        claimed = self._last_held() + 1
        if not leaving:
            claimed = max(claimed, self._last_suspect())
        # Of what was not fetched yet no more is known than before.
        suspects = begun.suspects if begun.suspects > self.next else 0
        if leaving:
            begun.repeated = max(begun.repeated, claimed)
        else:
            suspects = max(suspects, claimed, self.announced)
        return Notes(
            begun.topic, suspects, begun.repeated, set(self._done), known, written_ms=wall_ms
        )

    def foresee(self, count: int) -> None:
        """Announce what a claim of so many would take next, to spare it a commit of its own. Where
        the end of the log is far, that is also what is not fetched yet.
        """
        self.announced = max(self._last_held(), self._last_ahead(count)) + 1

    def _last_ahead(self, count: int) -> int:
        ready = [item.offset for item, _ in zip(self._fresh, range(count), strict=False)]
        if self._back:
            back = [offset for offset, _ in nsmallest(count, self._back)]
            ready = sorted([*ready, *back])[:count]
        last, found = self.runs.ahead(count - len(ready))
        missing = count - len(ready) - found
        if missing > 0 and self.next > self._end + _FAR:
            last = self.next - 1 + missing
        return max(last, *ready) if ready else last

    def _last_held(self) -> int:
        runs = [run.last for run in self.runs.claimed.values()]
        return max([*self.claimed, *runs], default=-1)

    def foretell(
        self,
        ended: Mapping[int, Known | None],
        ahead: int,
        wall_ms: int,
        now: float,
        *,
        done: Sequence[Run] = (),
        begun: int = 0,
    ) -> Foretold:
        """What there will be to commit once these claimed items have ended: with None settled, the
        others to come again, of which this is noted; and these runs, all of which are ``done``.
        Before ``begun`` some may have been started that come again. What a claim of so many, or
        of as many as the last one, would take next is announced with it.
        """
        notes = self.notes(wall_ms, now)
        notes.repeated = max(notes.repeated, begun)
        gone = {offset for offset, known in ended.items() if known is None}
        position = next((offset for offset in self.items if offset not in gone), self.next)
        if (first := self.runs.first_beside(done)) is not None:
            position = min(position, first)
        for run in done:
            if position <= run.last:
                gone.update(run.offsets)
        notes.done = {offset for offset in notes.done | gone if offset >= position}
        for offset, known in ended.items():
            notes.known.pop(offset, None)
            if known is not None:
                notes.known[offset] = known
        held = [offset for offset in self.claimed if offset not in ended]
        held += [run.last for run in self.runs.claimed.values() if run not in done]
        announced = max(self._last_ahead(max(ahead, self._latest)), *held, -1) + 1
        unread = self._begun.suspects if self._begun.suspects > self.next else 0
        notes.suspects = max(unread, announced, self._last_suspect())
        return Foretold(position, notes, announced, self.telling.doubts)

    def _last_suspect(self) -> int:
        offsets = (offset for offset in self._suspects if offset in self.items)
        return max((o for o in offsets if self.items[o].suspect), default=-1) + 1


def _is_ready(share: Share, item: Item) -> bool:
    return item.state is State.READY and share.items.get(item.offset) is item

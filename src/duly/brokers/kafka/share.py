"""`Share`: one partition as the process that is assigned it works it.

What was fetched is an `Item`, or one of a `Run`, until it is settled. The position, which is
committed, stands before the first that is not; `duly.brokers.kafka.notes` says what is committed
beside it. Nothing here locks or talks to a server: the intake's lock guards it all.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from duly.brokers.kafka.contents import Contents
from duly.brokers.kafka.extent import NOWHERE, START, Extent
from duly.brokers.kafka.item import Item, Order, State
from duly.brokers.kafka.lines import Lines
from duly.brokers.kafka.notes import MOST, REACH, Foretold, Known, Notes
from duly.brokers.kafka.ready import Ready, ReadyByLane
from duly.brokers.kafka.runs import Claim, Run
from duly.brokers.kafka.suspects import Suspects
from duly.brokers.kafka.telling import Telling

__all__ = ["Item", "Order", "Share", "State"]


# So far behind where the log's end was met last, more will follow.
_FAR = 1000
_NONE: Mapping[int, Known | None] = {}
_EMPTY: Mapping[str, int] = {}


class Share(Contents):
    """``position`` is where the notes were found, ``order`` what its subscription asks for, and
    ``key_lanes`` how many there are in order by them.

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
        key_lanes: int = 1,
    ) -> None:
        super().__init__(position)
        self.name = name
        self.log = log
        self.generation = generation
        self.order = order
        # Where somebody may be about to start what is there.
        self.announced = notes.extent
        self.telling = Telling(notes.extent)
        self.suspects = Suspects(notes, position, self.items, self.claimed)
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
        # Those that are no suspects any more when this process dies may have run all the same.
        notes.repeated = max(notes.repeated, notes.suspects)
        # From here on nothing is known of a message that is fetched.
        self._known_to = notes.known_to
        self._lines = Lines(order, key_lanes)
        self._ready = Ready(self.items)
        if order is Order.BY_LANE:
            self._ready = ReadyByLane(self.items, self._lines.is_free)
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
        # One that waits has not been started since that was noted.
        item.suspect = self.suspects.found.covers(offset) and due is None
        item.repeated |= offset < begun.repeated
        self.items[offset] = item
        self.size += len(item.body)
        self._lines.add(item)
        if due is not None:
            self.wait(item, due)
        elif item.suspect:
            self.suspects.offer(item)
        else:
            self._ready.fetched(item)

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

    def log_of(self, item: Item) -> str:
        """The log that it stands in for a cursor."""
        return self._lines.log_of(item, self.log)

    # --- claiming

    def lanes_a_claim(self, claimers: int) -> int:
        """Of how many lanes of keys a claim takes that leaves some for each of so many."""
        return self._lines.a_claim(claimers)

    def suspect(self, lined: dict[str, int], lanes: int = 1) -> Item | None:
        """The next of those that somebody may have died with, where it may be claimed now, beside
        what ``lined`` counts of this claim. It is not taken off yet. Where it is the first of a
        part, that is all that is announced from now on. ``lanes`` as in `next_ready`: what is
        of others is passed over until `Suspects.end_claim`.
        """
        suspects = self.suspects

        def is_others(item: Item) -> bool:
            by_lane = self.order is Order.BY_LANE and item.line is not None
            return by_lane and len(lined) >= lanes and item.line not in lined

        item = suspects.next(lambda each: self.may_start(each, lined), self.order, is_others)
        if item is None or suspects.part.covers(item.offset):
            return item
        if suspects.are_held():
            return None
        suspects.part = suspects.part_at(item.offset, self._done)
        if self.announced != (announced := self._extent() | suspects.part):
            self.announced = announced
            self.version += 1
        return item

    @property
    def _is_unread(self) -> bool:
        """Whether there are suspects that were not fetched yet, as far as is known."""
        return self._end < self.next < self.suspects.found.end

    @property
    def is_narrower(self) -> bool:
        """Whether the group takes others for suspects than those of the part that is begun."""
        return self.suspects.part is not NOWHERE and not self.telling.known.within(self.announced)

    def charge(self, item: Item, now: float) -> None:
        """This one is claimed, and its process holds nothing beside it: count its start."""
        self.suspects.charge(item, now)
        self.note(item)
        self.version += 1

    @property
    def _is_for_suspects(self) -> bool:
        """Whether nothing else may start, or it would be among them if somebody died."""
        suspects = self.suspects
        if not suspects:
            return False
        if suspects.are_held() or suspects.next(self.may_start, self.order) is not None:
            return True
        if not self._is_unread:
            suspects.part = NOWHERE
        return False

    def next_ready(self, now: float, lined: dict[str, int], lanes: int = 1) -> Item | None:
        """The next item that may be claimed beside what ``lined`` counts, by line, of this claim;
        it is not taken off yet. Of so many ``lanes`` of keys, where there are any.
        """
        self._wake(now)
        if self._is_for_suspects:
            return None
        while (item := self._ready.peek(lined, lanes)) is not None:
            if item.suspect:
                self._ready.drop()
                self.suspects.offer(item)
            elif self._is_too_much(item.offset):
                return None
            elif self.may_start(item, lined):
                return item
            elif self.order.is_in_lines and item.offset < self.position + REACH:
                self._ready.drop()
                item.state = State.BLOCKED
            else:
                return None
        return None

    def may_start(self, item: Item, lined: Mapping[str, int] = _EMPTY) -> bool:
        """Whether it may be claimed beside what ``lined`` counts, by line, of this claim."""
        if self.leaving or item.offset >= self.position + REACH:
            return False
        if self.order is Order.AS_LOGGED:
            taken = lined.get("", 0)
            return self.held == taken and self._is_next(item, taken)
        return self._lines.may_start(item, lined)

    def _is_next(self, item: Item, taken: int) -> bool:
        """Whether all before it is settled, or claimed by this same claim."""
        if not taken:
            return item.offset == self.position
        run, ready, suspect = self.runs.head(), self._ready.peek(), self.suspects.first()
        firsts = [first.offset for first in (ready, suspect) if first is not None]
        if min([*firsts, item.offset if run is None else run.first]) < item.offset:
            return False
        return not self._ready.waits_before(item.offset)

    def _is_too_much(self, offset: int) -> bool:
        return len(self._noted) >= MOST and offset > max(self._noted)

    def next_run(self, now: float, lined: dict[str, int]) -> Run | None:
        """The next run of which something may be claimed beside what ``lined`` counts of this
        claim, where no item comes before it. It is not claimed yet.
        """
        self._wake(now)
        run = self.runs.head()
        if run is None or self.leaving or run.first >= self.position + REACH:
            return None
        if self._is_too_much(run.first) or self._is_for_suspects:
            return None
        if self.order is Order.AS_LOGGED:
            before = next(iter(self.items), run.first) < run.first
            if before or self.held != lined.get("", 0):
                return None
        elif (item := self._ready.peek()) is not None and item.offset < run.first:
            return None
        return run

    def within_reach(self, run: Run) -> int:
        """How many of its first may be claimed, by how far that is behind the position."""
        return run.before(self.position + REACH)

    def take_run(self, run: Run, count: int, lined: dict[str, int], claim: Claim) -> None:
        """Claim the first ``count`` of a run, for a lane, until then."""
        self.runs.take(run, count, claim)
        self._latest = lined[""] = lined.get("", 0) + count

    def open(self, run: Run) -> None:
        """Keep the records of a run one by one from now on, claimed as they are."""
        self.runs.remove(run)
        items = {item.offset: item for item in run.items()}
        # In the order of offsets: the first is the position.
        there = sorted({**self.items, **items}.items())
        self.items.clear()
        self.items.update(there)
        for item in items.values():
            if item.token:
                item.state = State.CLAIMED
                self.claimed[item.offset] = item
            else:
                self._offer(item)

    def take(self, item: Item, lined: dict[str, int]) -> None:
        """Claim it."""
        (self.suspects if item.suspect else self._ready).drop()
        item.state = State.CLAIMED
        self.claimed[item.offset] = item
        if self.order is Order.AS_LOGGED:
            self._latest = lined[""] = lined.get("", 0) + 1
        self._unblock(self._lines.take(item, lined))

    def _unblock(self, offset: int | None) -> None:
        if offset is not None and (item := self.items[offset]).state is State.BLOCKED:
            self._offer(item)

    def _offer(self, item: Item) -> None:
        item.state = State.READY
        (self.suspects if item.suspect else self._ready).offer(item)

    def _wake(self, now: float) -> None:
        for item in self._ready.due(now):
            self._offer(item)

    def next_due(self) -> float | None:
        """When something comes due."""
        return self._ready.next_due()

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

    def reap(self, now: float) -> None:
        """Leases that are over make their messages suspect: who held them may hang, and with which
        of them nobody knows.
        """
        for run in [each for each in self.runs.claimed.values() if each.is_late(now)]:
            self.open(run)
        if late := [each for each in self.claimed.values() if each.is_late(now)]:
            for item in self.suspects.hang(late):
                self._offer(item)
            for item in late:
                self.give_up(item)

    def back(self, item: Item) -> None:
        """Not settled: it may be claimed again at once."""
        self._let_go(item, gone=False)
        self._offer(item)
        self._unblock(self._lines.head_beside(item))
        self.version += 1

    def wait(self, item: Item, due: float) -> None:
        """Not settled: it may be claimed again then."""
        if item.state is State.CLAIMED:
            self._let_go(item, gone=False)
        item.state, item.due = State.WAITING, due
        self._ready.wait(item)
        self._unblock(self._lines.head_beside(item))
        self.version += 1

    def _let_go(self, item: Item, *, gone: bool) -> None:
        self.claimed.pop(item.offset, None)
        self._lines.let_go(item, gone=gone)
        if gone:
            self._unblock(self._lines.head_beside(item))
        item.alone = item.settling = False
        item.token = 0

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
        known = begun.from_now(self.next, wall_ms)
        for offset, item in self._noted.items():
            waits = item.state is State.WAITING and item.due > now
            due_ms = wall_ms + int((item.due - now) * 1000) if waits else 0
            charged = item.charged - (leaving and item.alone)
            known[offset] = Known(charged, item.repeated, due_ms)
        extent = self._extent()
        if leaving:
            begun.repeated = max(begun.repeated, extent.end)
            extent = self.suspects.left(self.next)
        else:
            extent |= self.announced
        told = (begun.topic, extent.end, begun.repeated, set(self._done), known)
        return Notes(*told, written_ms=wall_ms, since=extent.first)

    def announce(self, offset: int) -> None:
        """Somebody is about to start this one."""
        if not self.announced.covers(offset):
            first = START if self.suspects.part is NOWHERE else offset
            self.announced |= Extent(first, offset + 1)
            self.version += 1

    def foresee(self, count: int) -> None:
        """Announce what a claim of so many would take next, to spare it a commit of its own. Where
        the end of the log is far, that is also what is not fetched yet.
        """
        self.announced = self._extent_ahead(count)

    def _extent_ahead(
        self, count: int, ended: Mapping[int, Known | None] = _NONE, done: Container[Run] = ()
    ) -> Extent:
        """Where claims stand and the next one will, once these have ended."""
        suspects = self.suspects
        held = self._extent(ended, done)
        if self.leaving:
            return held
        if suspects.are_held(ended):
            return held | suspects.part
        again = [offset for offset, known in ended.items() if known and not known.due_ms]
        next_ = [offset for offset in again if self.items[offset].suspect]
        next_ += [item.offset] if (item := suspects.first()) is not None else []
        next_ += [self.next] if self._is_unread else []
        if next_:
            return held | suspects.part_at(min(next_), self._done)
        return Extent(START, max(held.end, self._last_ahead(count) + 1))

    def _last_ahead(self, count: int) -> int:
        one_by_one, ready = self._ready.ahead(count)
        last, found = self.runs.ahead(count - ready)
        missing = count - ready - found
        if missing > 0 and self.next > self._end + _FAR:
            last = self.next - 1 + missing
        return max(last, one_by_one)

    def _extent(self, ended: Container[int] = (), done: Container[Run] = ()) -> Extent:
        """Of what is claimed, once these have ended."""
        held = [offset for offset in self.claimed if offset not in ended]
        for run in self.runs.claimed.values():
            held += [] if run in done else [run.first, run.last]
        return Extent(min(held), max(held) + 1) if held else NOWHERE

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
        announced = self._extent_ahead(max(ahead, self._latest), ended, done)
        notes.since, notes.suspects = announced
        return Foretold(position, notes, announced, self.telling.doubts)

"""`Suspects`: what a process may have died with, given out in parts that shrink.

Nobody knows which of the messages that were announced killed their process, and one by one they
would cost thousands of transactions after a single death. So they are cut into parts, and each is
announced by itself before anything of it starts: who dies with one leaves that part alone as
suspects, to be cut smaller by the successor. What comes in parts of one message comes alone, and
only there a death is charged.

What this has to stand, with what keeps it:

- *A message kills each time.* The part that it is in is at most a sixteenth of what was suspect
  before, so it is alone after log16 of that many deaths, whatever the others do. A part is
  counted in offsets that are not settled, all of them, so that what waits, is held up by its key,
  or was fetched late cannot make it grow.
- *A process dies of something else.* The part is suspect, the rest is ordinary; it is marked as
  repeated all the same. Whatever was settled stays so. A killer at the front is always in the
  part that is begun, so no other death lets it go.
- *A partition is handed over in order.* Nobody died, but suspects that have not had their turn
  stay suspect, and so does how far they were cut: else a group that is dealt out anew after each
  death would begin from the start for ever.
- *A part hangs.* Its lease ends, and it is cut smaller in the same process.
- *A retry holds up its key, or its partition.* It is no suspect, and goes first; suspects behind it
  have their turn as soon as they may start. As long as none may, others go on.
- *Several lanes.* They share a part; the next begins when it is over. A message that comes alone
  is charged only while its process holds nothing else of the subscription. Where others run
  already it is not charged; nor any more where others want to start once it has run for a second,
  which the group is told before they do. If its process dies it is *accused*: the next one lets
  what runs come to an end, and starts nothing beside it however long it takes.
- *A process that wakes late*, or whose announcement is not answered, starts nothing: a part that is
  narrower than what the group knows is not begun before the group knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from heapq import heappop, heappush

from duly.brokers.kafka.extent import NOWHERE, START, Extent
from duly.brokers.kafka.item import Item, Order, State
from duly.brokers.kafka.notes import Notes

PARTS = 16
"""Suspects are cut into so many parts."""

FEW = 32
"""So many, or fewer, come one by one."""

SOLE_S = 1.0
"""So long nothing is started beside one that is charged with its start. Most of what ends a process
does so at once, and handlers of minutes would keep all lanes from work.
"""


def part_of(count: int) -> int:
    """How many messages a part has where so many are suspect."""
    return 1 if count <= FEW else -(-count // PARTS)


class Suspects:
    """Of one partition, as they were found at ``position``; among the items of ``there`` and
    ``claimed``, by offset. ``found`` covers them, ``part`` those whose turn it is, and ``size`` is
    that of a part. ``accused`` is the offset of the one whose process died while it came alone;
    -1: there is none.
    """

    def __init__(
        self,
        notes: Notes,
        position: int,
        there: Mapping[int, Item],
        claimed: Mapping[int, Item],
    ) -> None:
        self._there = there
        self._claimed = claimed
        self.found = notes.extent
        self.part = NOWHERE
        self._end = self.found.end
        self._ready: list[int] = []
        self._passed: list[Item] = []
        found = range(max(position, self.found.first), self._end)
        left = [offset for offset in found if offset not in notes.done]
        self.size = part_of(len(left))
        self.accused = left[0] if len(left) == 1 and self.found.first != START else -1
        # The last one that was charged with its start, and when that was.
        self._sole: Item | None = None
        self._sole_since = 0.0

    def __bool__(self) -> bool:
        """Whether there may be any whose turn it is, or comes."""
        return bool(self._ready) or self.part is not NOWHERE

    @property
    def come_alone(self) -> bool:
        """Whether they come one by one."""
        return self.size == 1

    @property
    def for_solitude(self) -> Item | None:
        """The one whose process died while it came alone, where it waits for its turn."""
        item = self._there.get(self.accused)
        is_ready = item is not None and item.state is State.READY and item.suspect
        return item if is_ready else None

    @property
    def run_in_solitude(self) -> bool:
        """Whether one is held that is charged if its process dies."""
        return self._sole is not None and self._sole.alone

    def charge(self, item: Item, now: float) -> None:
        """Count the start of this one, which is claimed with nothing beside it."""
        item.alone = True
        item.charged += 1
        self._sole, self._sole_since = item, now

    def may_be_joined(self, now: float) -> bool:
        """Whether others may start beside the one that is charged, if that is taken back."""
        sole = self._sole
        accused = sole is not None and sole.offset == self.accused
        return not accused and now >= self._sole_since + SOLE_S

    def discharge(self) -> None:
        """Somebody is about to start something beside it: nobody could say whose fault it was."""
        if self._sole is not None and self._sole.alone:
            self._sole.alone = False
            self._sole.charged -= 1

    def offer(self, item: Item) -> None:
        """This one may be claimed."""
        heappush(self._ready, item.offset)

    def first(self) -> Item | None:
        """The first that may be claimed, unless something in front of it may not."""
        while self._ready:
            item = self._there.get(self._ready[0])
            if item is not None and item.state is State.READY and item.suspect:
                return item
            heappop(self._ready)
        return None

    def next(
        self,
        may_start: Callable[[Item], bool],
        order: Order,
        is_others: Callable[[Item], bool] = lambda _: False,
    ) -> Item | None:
        """The first that may be claimed now; where there are lines, what may not is held up from
        now on and does not keep others. What ``is_others`` is passed over until `end_claim`.
        """
        while (item := self.first()) is not None:
            if is_others(item):
                self._passed.append(item)
            elif may_start(item):
                break
            elif not order.is_in_lines:
                return None
            else:
                item.state = State.BLOCKED
            self.drop()
        return item

    def end_claim(self) -> None:
        """What this claim has left to others may be claimed by them."""
        passed, self._passed = self._passed, []
        for item in passed:
            self.offer(item)

    def drop(self) -> None:
        """Take off the first."""
        heappop(self._ready)

    def are_held(self, besides: Container[int] = ()) -> bool:
        """Whether any is claimed, beside these."""
        return any(each.suspect and o not in besides for o, each in self._claimed.items())

    def part_at(self, first: int, done: Container[int]) -> Extent:
        """The part that begins there; of these offsets nothing is left."""
        if self.part.covers(first):
            return self.part
        left, end = self.size, first
        while left and end < self._end:
            left -= end not in done
            end += 1
        return Extent(first, end)

    def left(self, fetched_to: int) -> Extent:
        """What has not had its turn, or not ended it."""
        offsets = [offset for offset, item in self._there.items() if item.suspect]
        there = Extent(min(offsets), max(offsets) + 1) if offsets else NOWHERE
        return there | Extent(max(fetched_to, self.found.first), self.found.end)

    def hang(self, late: Sequence[Item]) -> Sequence[Item]:
        """The leases of these are over, and they are suspects from now on. Where they were before,
        the others are none any more: those of them that may be claimed.
        """
        again = [item for item in late if item.suspect]
        others: list[Item] = []
        if again and self.come_alone:
            self.accused = again[0].offset
        elif again:
            others = [o for o in self._there.values() if o.suspect and o.state is not State.CLAIMED]
            for item in others:
                item.suspect = False
        before = sum(item.suspect for item in self._there.values())
        for item in late:
            item.suspect = item.repeated = True
        count = sum(item.suspect for item in self._there.values())
        # What was cut already must not be among more again.
        size = part_of(count)
        self.size = min(self.size, size) if before else size
        self._end = max(self._end, *(item.offset + 1 for item in late))
        self.part = NOWHERE
        return [item for item in others if item.state is State.READY]

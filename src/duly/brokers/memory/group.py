"""What one subscription of a broker in memory has claimed, waits for and gave up on.

A subscription reads each topic up to a cursor; behind the cursor every message that is not done
is an `Item` in exactly one state. Nothing here locks: the broker's lock guards it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from heapq import heappop, heappush
from typing import Any, assert_never

from duly.broker import Delivery, SubscribeOptions
from duly.brokers.memory.history import History
from duly.brokers.memory.items import Claim, Claimed, Item, Line, State
from duly.brokers.memory.shelf import Record, Shelf
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.inspection import DeadLetter, SubscriptionState


class Group:
    """One subscription. ``ordered`` and ``holds`` are what its lanes declared last."""

    def __init__(
        self,
        name: str,
        options: SubscribeOptions,
        history: History,
        wall_ms: Callable[[], int],
    ) -> None:
        self.name = name
        self.guarantee = options.guarantee
        self.ordered = options.order_by_key
        self.holds = options.hold_key_on_dead
        self.dead: dict[int, DeadLetter] = {}
        self._history = history
        self._wall_ms = wall_ms
        self._shelves: dict[str, Shelf] = {}
        self._cursors: dict[str, int] = {}
        self._items: dict[int, Item] = {}
        self._claims: dict[int, Claim] = {}
        self._lines: dict[tuple[str, str], Line] = {}
        self._ready: list[int] = []
        self._suspects: list[int] = []
        self._parked: list[tuple[float, int]] = []
        # By the wall clock: what a publisher gave names a moment, whatever becomes of clocks.
        self._due: list[tuple[int, int]] = []
        self._corpses: dict[int, Item] = {}

    # --- topics and options

    @property
    def topics(self) -> Sequence[str]:
        """The topics it reads."""
        return list(self._shelves)

    def read(self, topic: str, shelf: Shelf, first: int) -> None:
        """Read another topic from index ``first``."""
        self._shelves[topic] = shelf
        self._cursors[topic] = first

    def order(self, by_key: bool, hold: bool) -> None:
        """Take over what a lane declares; the lines are kept only where order is asked for."""
        self.holds = hold
        if by_key == self.ordered:
            return
        self.ordered = by_key
        self._lines.clear()
        for position in sorted(self._items):
            item = self._items[position]
            self._line_up(item)
            if item.state is State.CLAIMED and (line := self._line(item)):
                line.claimed += 1
            if item.state is State.BLOCKED:
                self._offer(item)

    def states(self) -> Iterator[SubscriptionState]:
        """How far it is with each topic."""
        for topic, shelf in sorted(self._shelves.items()):
            states = [item.state for item in self._items.values() if item.topic == topic]
            waiting = states.count(State.PARKED) + states.count(State.BLOCKED)
            yield SubscriptionState(
                self.name,
                topic,
                backlog=shelf.count_from(self._cursors[topic]) + states.count(State.READY),
                in_flight=states.count(State.CLAIMED),
                parked=waiting,
                dead=sum(letter.message.topic == topic for letter in self.dead.values()),
            )

    # --- claiming

    def take(
        self,
        lane: int,
        topics: AbstractSet[str],
        token: int,
        *,
        limit: int,
        max_bytes: int,
        now: float,
        lease_s: float,
    ) -> Sequence[Delivery]:
        """Claim what there is of the lane's topics: one suspect alone, or else a batch of the
        others.
        """
        self._reap(now)
        self._unpark(now)
        suspect = self._next(self._suspects, {}, topics)
        if suspect is not None:
            self._pick(suspect, {})
            taken = [suspect]
        else:
            taken = self._batch(limit, max_bytes, topics)
        if not taken:
            return ()
        claim = Claim(token, lane, alone=suspect is not None, asked_for_one=limit == 1)
        self._claims[token] = claim
        return [self._hand_out(item, claim, now + lease_s) for item in taken]

    def _batch(self, limit: int, max_bytes: int, topics: AbstractSet[str]) -> list[Item]:
        taken: list[Item] = []
        size = 0
        lined: dict[int, int] = {}
        while len(taken) < limit:
            item = self._next(self._ready, lined, topics)
            if item is None:
                if self._fetch(topics):
                    continue
                break
            if taken and size + item.message.size > max_bytes:
                heappush(self._ready, item.position)
                break
            self._pick(item, lined)
            taken.append(item)
            size += item.message.size
        return taken

    def _next(
        self, heap: list[int], lined: dict[int, int], topics: AbstractSet[str]
    ) -> Item | None:
        """The first of a heap that may be claimed; what is behind in its line is set aside.

        ``lined`` counts, by line, the items that the batch has taken already: one lane runs
        them in order, so that the next of the same key may join. What is of other topics stays.
        """
        of_others: list[int] = []
        found = None
        while heap and found is None:
            item = self._items.get(heappop(heap))
            if item is None or item.state is not State.READY:
                continue
            if item.topic not in topics:
                of_others.append(item.position)
            elif self._is_first(item, lined):
                found = item
            else:
                item.state = State.BLOCKED
        for position in of_others:
            heappush(heap, position)
        return found

    def _is_first(self, item: Item, lined: dict[int, int]) -> bool:
        line = self._line(item)
        if line is None:
            return True
        ahead = lined.get(id(line), 0)
        return line.claimed == ahead and line.positions[ahead] == item.position

    def _pick(self, item: Item, lined: dict[int, int]) -> None:
        # Claimed at once, so that nothing offers it again while the batch is put together.
        item.state = State.CLAIMED
        line = self._line(item)
        if line is not None:
            line.claimed += 1
            ahead = lined[id(line)] = lined.get(id(line), 0) + 1
            self._unblock(line, ahead)

    def _fetch(self, topics: AbstractSet[str]) -> bool:
        """Move the oldest unread message behind the cursor; False when there is none."""
        found = [(r.position, topic, r) for topic, r in self._unread() if topic in topics]
        if not found:
            return False
        position, topic, record = min(found, key=lambda entry: entry[0])
        self._cursors[topic] = record.index + 1
        item = Item(position, topic, record.message, record)
        self._items[position] = item
        self._line_up(item)
        due_ms = record.message.due_ms
        if due_ms is not None and due_ms > self._wall_ms():
            item.state = State.PARKED
            heappush(self._due, (due_ms, item.position))
        else:
            self._offer(item)
        return True

    def _unread(self) -> Iterator[tuple[str, Record]]:
        for topic, shelf in self._shelves.items():
            record = shelf.after(self._cursors[topic])
            if record is not None:
                yield topic, record

    def _hand_out(self, item: Item, claim: Claim, until: float) -> Delivery:
        item.token, item.until = claim.token, until
        claim.positions.add(item.position)
        if claim.alone:
            item.charged += 1
        attempt = item.charged if claim.alone else item.charged + 1
        receipt = Claimed(self.name, item.position, claim.token)
        return Delivery(
            item.message, receipt, attempt, item.repeated, claim.alone, replays=item.replays
        )

    # --- settling

    def held(self, receipt: Any) -> Item | None:
        """The item that a receipt still holds."""
        if not isinstance(receipt, Claimed) or receipt.subscription != self.name:
            return None
        item = self._items.get(receipt.position)
        if item is None or item.state is not State.CLAIMED or item.token != receipt.token:
            return None
        return item

    def settle(self, settlements: Sequence[Settlement], now: float) -> Sequence[Any]:
        """Settle those whose claim still holds; returns the receipts of the others."""
        refused = []
        for settlement in settlements:
            item = self.held(settlement.receipt)
            if item is None:
                refused.append(settlement.receipt)
                self._note_refused(settlement)
            else:
                self._settle_one(item, settlement, now)
        return refused

    def _settle_one(self, item: Item, settlement: Settlement, now: float) -> None:
        alone = self._let_go(item)
        match settlement:
            case Done():
                self._finish(item, now)
            case Retry(charged=False):
                item.charged -= alone
                self._park(item, now + settlement.delay_s)
            case Retry():
                item.charged += not alone
                item.suspect, item.repeated = False, True
                self._note("retry", item, f"attempt {item.charged}: {settlement.error}")
                self._park(item, now + settlement.delay_s)
            case Dead():
                item.charged += not alone
                self._bury(item, settlement.error, now)
            case Release():
                item.charged -= alone
                item.repeated = item.repeated or settlement.started
                self._offer(item)
            case _:
                assert_never(settlement)

    def _let_go(self, item: Item) -> bool:
        """Take an item out of its claim; whether it was alone in it."""
        claim = self._claims[item.token]
        claim.positions.discard(item.position)
        if not claim.positions:
            del self._claims[claim.token]
        line = self._line(item)
        if line is not None:
            line.claimed -= 1
            self._unblock(line, 0)
        return claim.alone

    def _finish(self, item: Item, now: float) -> None:
        del self._items[item.position]
        if item.record is not None:
            self._shelves[item.topic].done(item.record, now)
        line = self._line(item)
        if line is not None:
            line.positions.remove(item.position)
            self._unblock(line, 0)
            if not line.positions:
                del self._lines[item.topic, item.message.key or ""]

    def _bury(self, item: Item, error: str, now: float) -> None:
        letter = self._history.letter(self.name, item.message, error, item.charged, item.replays)
        self.dead[item.position] = letter
        self._corpses[item.position] = item
        self._note("dead-letter", item, error)
        if self.holds and self.ordered and item.message.key is not None:
            item.state = State.HELD
        else:
            self._finish(item, now)

    def mend(self, letter: DeadLetter, now: float, *, again: bool) -> bool:
        """Deliver a dead letter again, as if for the first time, or forget it; a key that it
        held goes on. Whether it was there.
        """
        found = [p for p, each in self.dead.items() if each.number == letter.number]
        if not found:
            return False
        [position] = found
        self._history.mended(self.dead.pop(position), position, again=again)
        item = self._corpses.pop(position)
        if again:
            self._replay(item)
        elif item.position in self._items:
            self._finish(item, now)
        return True

    def _replay(self, item: Item) -> None:
        item.charged, item.suspect, item.repeated = 0, False, False
        item.replays += 1
        if item.position not in self._items:
            item.record = None  # the topic need not keep it: the item does
            self._items[item.position] = item
            self._line_up(item, first=True)
        self._offer(item)

    # --- leases

    def extend(self, receipts: Sequence[Any], until: float) -> Sequence[Any]:
        """Hold these messages until then, and no others; returns those that are lost."""
        lost = []
        for receipt in receipts:
            item = self.held(receipt)
            if item is None:
                lost.append(receipt)
            else:
                item.until = until
        return lost

    def release(self, lane: int) -> None:
        """Give back all that a lane has claimed, uncharged."""
        for claim in self._claims_of(lane):
            for position in sorted(claim.positions):
                item = self._items[position]
                item.charged -= self._let_go(item)
                item.repeated = True  # it may have run, though nobody settled it
                self._offer(item)

    def crash(self, lane: int, why: str = "its worker died") -> None:
        """A lane is gone: what it had claimed is suspect, and charged only where alone."""
        burden = self._burden(lane)
        for claim in self._claims_of(lane):
            self._suspect(claim, sorted(claim.positions), why, sole=burden == 1)

    def _claims_of(self, lane: int) -> Sequence[Claim]:
        return [claim for claim in self._claims.values() if claim.lane == lane]

    def _reap(self, now: float) -> None:
        late = [
            (claim, sorted(p for p in claim.positions if self._items[p].until <= now))
            for claim in self._claims.values()
        ]
        # Before any is let go: who held two messages is not charged for either.
        burdens = {claim.lane: self._burden(claim.lane) for claim, positions in late if positions}
        for claim, positions in late:
            sole = burdens.get(claim.lane) == 1
            self._suspect(claim, positions, "its lease ended", sole=sole)

    def _burden(self, lane: int) -> int:
        """How many messages a lane holds."""
        return sum(len(claim.positions) for claim in self._claims_of(lane))

    def _suspect(self, claim: Claim, positions: Sequence[int], why: str, *, sole: bool) -> None:
        for position in positions:
            item = self._items[position]
            item.suspect = item.repeated = True
            item.charged += sole and claim.asked_for_one and not claim.alone
            self._let_go(item)
            self._note("redelivery", item, f"attempt {item.charged}: {why}")
            self._offer(item)

    def next_event(self, now: float) -> float | None:
        """When something becomes claimable by itself: a due time or the end of a lease."""
        times = [
            self._items[position].until
            for claim in self._claims.values()
            for position in claim.positions
        ]
        if self._parked:
            times.append(self._parked[0][0])
        if self._due:
            times.append(now + (self._due[0][0] - self._wall_ms()) / 1000)
        return min(times, default=None)

    # --- moving items between states

    def _offer(self, item: Item) -> None:
        item.state = State.READY
        heappush(self._suspects if item.suspect else self._ready, item.position)

    def _park(self, item: Item, due: float) -> None:
        item.state = State.PARKED
        heappush(self._parked, (due, item.position))

    def _unpark(self, now: float) -> None:
        while self._parked and self._parked[0][0] <= now:
            item = self._items.get(heappop(self._parked)[1])
            if item is not None and item.state is State.PARKED:
                self._offer(item)
        while self._due and self._due[0][0] <= self._wall_ms():
            self._offer(self._items[heappop(self._due)[1]])

    def _unblock(self, line: Line, place: int) -> None:
        """Offer what stands at a place of a line, where it only waited for those before."""
        if line.claimed == place and place < len(line.positions):
            item = self._items[line.positions[place]]
            if item.state is State.BLOCKED:
                self._offer(item)

    def _line(self, item: Item) -> Line | None:
        """The line an item stands in, where order by key is asked for and it has a key."""
        if not self.ordered or item.message.key is None:
            return None
        return self._lines.setdefault((item.topic, item.message.key), Line())

    def _line_up(self, item: Item, *, first: bool = False) -> None:
        line = self._line(item)
        if line is not None:
            if first:
                line.positions.appendleft(item.position)
            else:
                line.positions.append(item.position)

    def _note(self, kind: str, item: Item, detail: str) -> None:
        self._history.add(
            kind,
            subscription=self.name,
            message=item.message,
            position=item.position,
            detail=detail,
        )

    def _note_refused(self, settlement: Settlement) -> None:
        position = getattr(settlement.receipt, "position", None)
        item = None if position is None else self._items.get(position)
        self._history.add(
            "stale-settle",
            subscription=self.name,
            message=None if item is None else item.message,
            position=position,
            detail=type(settlement).__name__,
        )

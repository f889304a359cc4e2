"""One subscription of a log in memory: its lanes, and which partition is whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, assert_never

from duly.broker import Delivery, SubscribeOptions
from duly.brokers.memory.history import History
from duly.brokers.memory.partition import Entry, KeyLane, KeyLanes, Partition
from duly.brokers.memory.share import Flight, LogReceipt, Share
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement
from duly.inspection import DeadLetter, SubscriptionState


def key_lanes_of(options: SubscribeOptions) -> int:
    """Into how many lanes of keys partitions are cut."""
    return options.key_lanes if options.guarantee is Guarantee.EXACTLY_ONCE else 1


@dataclass(frozen=True, slots=True)
class Corpse:
    """A dead letter and where it stood; ``holding``: the partition waits behind it."""

    letter: DeadLetter
    log: str
    entry: Entry
    holding: bool
    replays: int


class LogGroup:
    """A consumer group. Each lane that joins or leaves makes a new generation.

    A partition that stays with its lane keeps the generation in which the lane got it, so that
    its receipts stay good; one that changes hands has all its earlier receipts refused.
    """

    def __init__(
        self,
        name: str,
        options: SubscribeOptions,
        history: History,
    ) -> None:
        self.name = name
        self.guarantee = options.guarantee
        self.key_lanes = key_lanes_of(options)
        self.ordered = options.order_by_key
        self.holds = options.hold_key_on_dead
        self.generation = 0
        self.shares: dict[str, Share] = {}
        self.members: dict[int, AbstractSet[str]] = {}
        self._history = history
        self._corpses: list[Corpse] = []
        self._turn = 0

    # --- partitions and lanes

    def read(self, partitions: Sequence[Partition], options: SubscribeOptions) -> None:
        """Read these partitions too, each new one from where the options say."""
        for partition in partitions:
            if not self.of(partition):
                first = partition.first(options.start)
                for part in self._cut(partition):
                    self.shares[part.log] = Share(self.name, part, first)

    def _cut(self, partition: Partition) -> Sequence[Partition | KeyLane]:
        if self.key_lanes == 1:
            return [partition]
        cut = KeyLanes(partition, self.key_lanes)
        return [KeyLane(cut, number) for number in range(self.key_lanes)]

    def of(self, partition: Partition) -> Sequence[Share]:
        """What is read of a partition: all of it, or its lanes of keys."""
        return [share for share in self.shares.values() if share.partition.whole is partition]

    def forget(self, partition: Partition) -> None:
        """It was deleted."""
        for share in self.of(partition):
            del self.shares[share.partition.log]

    def join(self, lane: int, topics: AbstractSet[str]) -> None:
        """A lane comes with the topics it reads, or comes back after it was taken for dead."""
        self.members[lane] = topics
        self._rebalance()

    def leave(self, lane: int, *, died: bool) -> None:
        """A lane goes; what it had in flight comes again, as suspect where it died."""
        if lane not in self.members:
            return
        del self.members[lane]
        owned = [share for share in self.shares.values() if share.owner == lane]
        sole = sum(len(share.flying) for share in owned) == 1
        for share in owned:
            self._revoke(share, died=died, sole=sole)
        self._rebalance()

    def _rebalance(self) -> None:
        """Deal the partitions evenly to those who read them, and move no more than that takes."""
        self.generation += 1
        load = Counter(share.owner for share in self.shares.values())
        for share in self.shares.values():
            readers = [m for m, topics in self.members.items() if share.partition.topic in topics]
            if not readers:
                continue
            least = min(readers, key=lambda lane: load[lane])
            if share.owner is not None and load[share.owner] <= load[least] + 1:
                continue
            load[share.owner] -= 1
            load[least] += 1
            self._revoke(share, died=False, sole=False)
            share.owner = least
            share.generation = self.generation

    def _revoke(self, share: Share, *, died: bool, sole: bool) -> None:
        for offset in sorted(share.flying):
            detail = "its worker died or fell silent" if died else "its partition moved"
            self._note("redelivery", share, offset, f"attempt {share.attempts(offset)}: {detail}")
        share.revoke(died=died, sole=sole)
        share.owner = None

    def expire(self, now: float) -> None:
        """Lanes that let a lease end are taken for dead; they come back when they claim."""
        late = {
            share.owner
            for share in self.shares.values()
            if share.owner is not None
            and any(flight.until <= now for flight in share.flying.values())
        }
        for lane in sorted(late):
            self.leave(lane, died=True)

    # --- claiming

    def take(
        self, lane: int, token: int, *, limit: int, max_bytes: int, now: float, lease_s: float
    ) -> Sequence[Delivery]:
        """Claim for a lane what its partitions have to give: a suspect alone, or a batch."""
        mine = self._in_turn(lane)
        until = now + lease_s
        for share in mine:
            entry = self._suspect(share, now)
            if entry is not None:
                return [share.take(entry, Flight(token, until, True, False))]
        flight = (token, until, False, limit == 1)
        chosen: list[tuple[Share, Entry]] = []
        size = 0
        for share, entry in self._offers(mine, now):
            size += entry.message.size
            if len(chosen) == limit or (chosen and size > max_bytes):
                break
            chosen.append((share, entry))
        return [share.take(entry, Flight(*flight)) for share, entry in chosen]

    def _in_turn(self, lane: int) -> Sequence[Share]:
        """A lane's partitions, each claim beginning with another, so that none starves."""
        mine = [share for share in self.shares.values() if share.owner == lane]
        self._turn += 1
        start = self._turn % len(mine) if mine else 0
        return mine[start:] + mine[:start]

    @property
    def _in_turns(self) -> bool:
        """Whether a partition waits behind anything in flight.

        Also where only what stands before has taken effect, or was settled, for certain: a
        cursor that moved past a message in flight would pass that over, and what was settled
        behind one comes again when the partition moves.
        """
        return self.ordered or self.guarantee is not Guarantee.AT_LEAST_ONCE

    def _suspect(self, share: Share, now: float) -> Entry | None:
        for entry, past in share.offers(now, ordered=self._in_turns):
            return entry if past is not None and past.suspect else None
        return None

    def _offers(self, mine: Sequence[Share], now: float) -> Iterator[tuple[Share, Entry]]:
        for share in mine:
            for entry, past in share.offers(now, ordered=self._in_turns):
                if past is not None and past.suspect:
                    break  # it comes alone, when it is the first
                yield share, entry

    def next_event(self, lane: int) -> float | None:
        """When something changes by itself: a partition is due, or a lease ends."""
        times = [flight.until for share in self.shares.values() for flight in share.flying.values()]
        for share in self.shares.values():
            due = share.next_due() if share.owner == lane else None
            if due is not None:
                times.append(due)
        return min(times, default=None)

    # --- settling

    def held(self, receipt: Any) -> Share | None:
        """The partition in which a receipt still holds its claim."""
        if not isinstance(receipt, LogReceipt) or receipt.subscription != self.name:
            return None
        share = self.shares.get(receipt.log)
        return share if share is not None and share.holds(receipt) else None

    def settle(self, settlements: Sequence[Settlement], now: float) -> Sequence[Any]:
        """Settle those whose claim still holds; returns the receipts of the others."""
        refused = []
        for settlement in settlements:
            share = self.held(settlement.receipt)
            if share is None:
                refused.append(settlement.receipt)
                self._note_refused(settlement)
            else:
                self._settle_one(share, settlement, now)
        return refused

    def _settle_one(self, share: Share, settlement: Settlement, now: float) -> None:
        offset = settlement.receipt.offset
        match settlement:
            case Done():
                share.done(offset)
            case Retry(charged=False):
                share.wait(offset, now + settlement.delay_s)
            case Retry():
                attempts = share.retry(offset, now + settlement.delay_s)
                self._note("retry", share, offset, f"attempt {attempts}: {settlement.error}")
            case Dead():
                self._bury(share, offset, settlement.error)
            case Release():
                share.release(offset, started=settlement.started)
            case _:
                assert_never(settlement)

    def extend(self, receipts: Sequence[Any], until: float) -> Sequence[Any]:
        """Hold these claims until then; returns those that are lost."""
        lost = []
        for receipt in receipts:
            share = self.held(receipt)
            if share is None:
                lost.append(receipt)
            else:
                share.flying[receipt.offset].until = until
        return lost

    # --- dead letters

    def _bury(self, share: Share, offset: int, error: str) -> None:
        attempts = share.attempts(offset)
        entry = share.entry(offset)
        assert entry is not None, "a flying offset has its message: retention waits for it"
        self._note("dead-letter", share, offset, error)
        replays = share.replays(offset)
        letter = self._history.letter(self.name, entry.message, error, attempts, replays)
        holding = self.holds and self.ordered and entry.message.key is not None
        self._corpses.append(Corpse(letter, share.partition.log, entry, holding, replays))
        if holding:
            share.hold(offset)
        else:
            share.done(offset)

    def keep(self, letter: DeadLetter) -> None:
        """Keep a dead letter of a message that a store had parked: it stands nowhere any more."""
        nowhere = Entry(-1, 0, letter.message, letter.message.time_ms)
        kept = self._history.letter(
            self.name, letter.message, letter.error, letter.attempts, letter.replays
        )
        self._corpses.append(Corpse(kept, "", nowhere, holding=False, replays=letter.replays))

    def dead(self) -> Sequence[DeadLetter]:
        """The dead letters, oldest first."""
        return [corpse.letter for corpse in self._corpses]

    def mend(self, letter: DeadLetter, *, again: bool) -> bool:
        """Remove a dead letter and, if ``again``, deliver it; a partition that waited behind it
        goes on. Whether it was there.
        """
        for corpse in self._corpses:
            if corpse.letter.number == letter.number:
                break
        else:
            return False
        self._corpses.remove(corpse)
        self._history.mended(corpse.letter, corpse.entry.offset, again=again)
        share = self.shares.get(corpse.log)
        if share is None:
            pass  # its topic was deleted
        elif again:
            share.replay(corpse.entry, corpse.replays + 1)
        elif corpse.holding:
            share.unhold(corpse.entry.offset)
        return True

    # --- what people see

    def states(self, now: float) -> Iterator[SubscriptionState]:
        """How far it is with each topic."""
        topics = {share.partition.topic for share in self.shares.values()}
        for topic in sorted(topics):
            shares = [share for share in self.shares.values() if share.partition.topic == topic]
            backlog, in_flight, parked = map(sum, zip(*(s.count(now) for s in shares), strict=True))
            dead = sum(corpse.letter.message.topic == topic for corpse in self._corpses)
            yield SubscriptionState(self.name, topic, backlog, in_flight, parked, dead)

    def _note(self, kind: str, share: Share, offset: int, detail: str) -> None:
        entry = share.entry(offset)
        self._history.add(
            kind,
            subscription=self.name,
            message=None if entry is None else entry.message,
            position=offset,
            detail=detail,
        )

    def _note_refused(self, settlement: Settlement) -> None:
        share = self.shares.get(getattr(settlement.receipt, "log", ""))
        offset = getattr(settlement.receipt, "offset", None)
        entry = None if share is None or offset is None else share.entry(offset)
        self._history.add(
            "stale-settle",
            subscription=self.name,
            message=None if entry is None else entry.message,
            position=offset,
            detail=type(settlement).__name__,
        )

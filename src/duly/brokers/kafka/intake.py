"""`Intake`: one subscription as this process consumes it: a member of its group, on a thread.

The lanes of a subscription share it: they compete for what was fetched, so that there may be more
of them than partitions. ``changed`` locks all that they see. The driver's consumer is used by this
thread alone: while it polls, others would wait.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, TopicPartition

from duly.broker import Start
from duly.brokers.kafka.address import Address
from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.assigned import Beginnings, nothing_there
from duly.brokers.kafka.client import broker_error, consuming
from duly.brokers.kafka.commits import Awaits, Commits
from duly.brokers.kafka.fetched import Fetched, all_are_there, by_partition
from duly.brokers.kafka.item import Way
from duly.brokers.kafka.notes import REACH
from duly.brokers.kafka.positions import Positions
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.receipt import Receipt, SpanReceipt
from duly.brokers.kafka.records import Records
from duly.brokers.kafka.runs import Run
from duly.brokers.kafka.share import Item, Order, Share
from duly.brokers.kafka.stillness import Stillness
from duly.brokers.kafka.transacted import Transacted
from duly.brokers.kafka.untaken import Untaken
from duly.errors import BrokerUnavailable, BrokerUnusable, SubscriptionEnded
from duly.guarantees import Guarantee
from duly.message import Topic

log = logging.getLogger("duly.kafka")

numbers = itertools.count(1)
"""What receipts name an intake by."""

_JOINS_S = 60.0
_LEAVES_S = 15.0
_POLLS_S = 0.05
# So many records are taken from the driver in one go; and so few where lanes have something to do:
# an answer of the group's is not seen meanwhile.
_AT_ONCE, _FEW = 1000, 250
# With so many of a partition ready to be claimed there is no hurry to take more. While the group is
# asked, who waits for that starts nothing, and there is time for as many as this.
_PLENTY, _MORE = REACH // 2, REACH + REACH // 2
# What the group answers is looked for so often then, and less often where nobody waits for it, or
# nothing is on its way: each look takes the interpreter from the lanes.
_ANSWERS_S = {Awaits.SOMEBODY: 0.0001, Awaits.NOBODY: 0.001, Awaits.NOTHING: 0.005}
# Of a cluster that is away the driver tells many times a second.
_TELLS_S = 30.0
# How long a rebalance waits for handlers that run; what is not settled by then comes again.
DRAINS_S = 5.0
_NOTHING_THERE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)
# Bodies that were fetched and wait; then fetching pauses until it is half of that.
_MOST_BYTES = 64 * 1024 * 1024


class Intake:
    """``topics`` are those that it reads, by their names on the cluster; ``again`` is where what
    only this subscription is given stands; ``lanes`` are the numbers of those that share it. With
    ``producers`` positions are committed by transactions of Kafka's.
    """

    def __init__(
        self,
        address: Address,
        admin: Admin,
        records: Callable[[], Records],
        subscription: str,
        group: str,
        guarantee: Guarantee,
        way: Way,
        again: str,
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
        producers: Producers | None = None,
    ) -> None:
        self.number = next(numbers)
        self.subscription = subscription
        self.guarantee = guarantee
        self.order = way.order
        self.key_lanes = way.key_lanes
        self.lanes: set[int] = set()
        self.changed = threading.Condition()
        self.shares: dict[tuple[str, int], Share] = {}
        self.by_generation: dict[int, Share] = {}
        self.failed: SubscriptionEnded | None = None
        self._moved: dict[int, int] = {}
        self.again = again
        self.fetched = Fetched(again, clock, wall_ms, as_runs=way.as_runs)
        around = (subscription, self.changed, self.by_generation, clock, wall_ms)
        self.commits: Commits | Transacted = (
            Commits(*around)
            if producers is None
            else Transacted(*around, producers, Positions(address, group))
        )
        self._admin = admin
        self._is_eager = address.is_eager
        self._topics: dict[str, Topic[Any]] = {}
        self._starts: dict[str, Start] = {}
        self._wanted = 0
        self._asked = 0
        self._joined = 0
        self._paused: set[tuple[str, int]] = set()
        self._early: list[Any] = []
        self._stop = threading.Event()
        self._told_s = -math.inf
        self._untaken = Untaken()
        self._stillness = Stillness(address.stands_still_s)
        self._tidied = 0
        self._gone = False  # as by the death of the process: nothing more is committed
        self._beginnings = Beginnings(
            admin,
            records,
            subscription,
            self._order_of,
            self._start_of,
            self.commits.begin,
            lambda: "" if producers is None else producers.owner,
            way.key_lanes,
        )
        self._consumer: Any = Consumer(consuming(address, group, self.commits.answered))
        self._thread = threading.Thread(
            target=self._run, name=f"duly-kafka-{subscription}", daemon=True
        )
        self._thread.start()

    # --- what is read

    def read(self, topics: Mapping[str, Topic[Any]], start: Start) -> None:
        """Read these too, and return when the group has dealt them out. Raises `BrokerError`."""
        with self.changed:
            new = {name: topic for name, topic in topics.items() if name not in self._topics}
            self._topics |= new
            self._starts |= dict.fromkeys(new, start)
            self.fetched.declared = self._topics
            if new:
                self._wanted += 1
            wanted, until = self._wanted, time.monotonic() + _JOINS_S
            while self._joined < wanted and self.failed is None and not self._stop.is_set():
                if not self.changed.wait(max(0.0, until - time.monotonic())):
                    raise BrokerUnavailable(
                        f"subscription {self.subscription!r}: Kafka has not let this process join "
                        f"its group within {_JOINS_S:.0f} s"
                    )
            if self.failed is not None:
                raise self.failed

    def _start_of(self, topic: str) -> Start:
        return "earliest" if topic == self.again else self._starts.get(topic, "earliest")

    def _order_of(self, topic: str) -> Order:
        # A log of its own: what is given again there is in no order with the rest.
        ordered = self.order is Order.BY_KEY and topic == self.again
        return Order.NONE if ordered else self.order

    # --- on its thread

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._hear_of_itself()
                self._ask()
                self.commits.serve(self._consumer)
                self._fetch()
                self._press()
            self._leave()
        except Exception as error:
            log.exception("subscription %r: nothing more is fetched", self.subscription)
            self._end(f"subscription {self.subscription!r}: {error!r}")
        finally:
            self.commits.end()
            self._consumer.close()

    def _fetch(self) -> None:
        """Let the driver tell what it has to, and take what was fetched. Where lanes have enough
        to do, little of that is taken: to be paused and resumed costs the driver all that it has
        fetched ahead, and who is quick would wait for it.
        """
        ready, awaits = self._ready(), self.commits.awaits
        plenty = _MORE if awaits is Awaits.SOMEBODY else _PLENTY
        rests = ready >= plenty and len(self._early) < _AT_ONCE
        idle_s = time.monotonic() - self.commits.active_s
        # Whoever settles meanwhile waits for that: it is a tenth of how long nothing has happened.
        patience_s = min(_POLLS_S, max(0.001, idle_s / 10))
        if rests:
            self.commits.rest(min(_POLLS_S, max(_ANSWERS_S[awaits], idle_s / 100)))
        first = self._consumer.poll(0 if rests else patience_s)
        if first is not None:
            self._early.append(first)  # it comes with the answer to a commit
        if self._early and not rests:
            self._early += self._consumer.consume(_AT_ONCE if ready < _FEW else _FEW, 0)
            records, self._early = self._early, []
            self._take(records)

    def _ready(self) -> int:
        """How many messages of a partition can be claimed at most."""
        with self.changed:
            return max([share.ready for share in self.shares.values()], default=0)

    def _leave(self) -> None:
        with self.changed:
            shares = list(self.shares.values())
        if not self._gone:
            self.commits.surely(self._consumer, shares)
        self._forget(shares)

    def _ask(self) -> None:
        # What has failed for good is not mended by joining again, which holds up all others.
        if self.failed is None and (untaken := self._untaken.overdue()):
            self._tell(f"it leaves the group and joins again: it took none of {untaken}")
            self._consumer.unsubscribe()
            self._asked = 0
        with self.changed:
            wanted, names = self._wanted, [*self._topics, self.again]
        if self._asked < wanted:
            self._asked = wanted
            self._consumer.subscribe(
                names,
                on_assign=self._on_assign,
                on_revoke=self._on_revoke,
                on_lost=self._on_lost,
            )

    def _take(self, records: Sequence[Any]) -> None:
        self.commits.active_s = time.monotonic()
        # Looked at before the lock is taken: lanes need it.
        found = [(name, self.fetched.divide(some)) for name, some in by_partition(records)]
        with self.changed:
            for name, parts in found:
                share = self.shares.get(name)
                if share is not None:
                    self.fetched.put(share, parts)
            if not all_are_there(records):
                for record in records:
                    if record.error() is not None:
                        self._hear(record)
            self.changed.notify_all()

    def _hear(self, record: Any) -> None:
        """What the driver tells of a partition, or of the cluster."""
        share = self.shares.get((record.topic(), record.partition()))
        error = record.error()
        if error.code() == KafkaError._PARTITION_EOF:
            if share is not None:
                share.reached(record.offset())
        elif (why := self._ending(error, record, share)) is not None:
            self._end(why)
        else:
            self._tell(error)

    def _ending(self, error: KafkaError, record: Any, share: Share | None) -> str | None:
        """Why nothing goes on after this; None where the driver asks again until it does."""
        if share is not None and error.code() in _NOTHING_THERE:
            return nothing_there(self.subscription, [share.name], error.str())
        told = broker_error(error, f"subscription {self.subscription!r}: {record.topic()}")
        denied = share is not None and isinstance(told, BrokerUnusable)
        return str(told) if denied or error.fatal() else None

    def _tell(self, what: object) -> None:
        """Say what the driver meets time and again, now and then."""
        if time.monotonic() > self._told_s + _TELLS_S:
            self._told_s = time.monotonic()
            log.warning("subscription %r: %s", self.subscription, what)

    def _end(self, why: str) -> None:
        """Nothing more is given out. The first reason is the one that is told."""
        with self.changed:
            if self.failed is None:
                self.failed = SubscriptionEnded(why)
            self.changed.notify_all()

    def _press(self) -> None:
        """Fetch no more of what there is enough of, and again of what there is room for."""
        with self.changed:
            waiting = sum(share.size for share in self.shares.values())
            full = {
                name
                for name, share in self.shares.items()
                if share.is_full
                or waiting > _MOST_BYTES
                or (name in self._paused and (share.is_half_full or waiting > _MOST_BYTES // 2))
            }
            paused, resumed = full - self._paused, (self._paused - full) & self.shares.keys()
            self._paused = full
        if paused:
            self._consumer.pause([TopicPartition(*name) for name in paused])
        if resumed:
            self._consumer.resume([TopicPartition(*name) for name in resumed])

    # --- rebalances

    def _on_assign(self, consumer: Any, given: Sequence[TopicPartition]) -> None:
        shares = self._begun(consumer, given) if given else []
        with self.changed:
            for share in shares:
                self.shares[share.name] = share
                self.by_generation[share.generation] = share
            self._joined = self._asked
            self.changed.notify_all()
        self._untaken.given(given, {share.name for share in shares})
        places = [TopicPartition(share.name[0], share.name[1], share.next) for share in shares]
        if self._is_eager:
            consumer.assign(places)
        else:
            consumer.incremental_assign(places)
        self.commits.rebalanced(consumer)

    def _begun(self, consumer: Any, given: Sequence[TopicPartition]) -> Sequence[Share]:
        """Where these go on, as soon as that is told."""

        def asks() -> bool:
            self._hear_of_itself()
            return not self._stop.is_set() and self.failed is None

        self.commits.take_over(given, lambda: self._beginnings.takers(given))
        try:
            return self._beginnings.at_last(
                consumer, given, self.commits, asks, self._tell, self._stop.wait
            )
        except BrokerUnusable as error:
            self._end(str(error))
            return []

    def _on_revoke(self, consumer: Any, taken: Sequence[TopicPartition]) -> None:
        """Hand over in an orderly way: what runs is settled first, as far as time allows."""
        shares = self._of(taken)
        self.commits.rebalanced(consumer)
        if not self._gone:
            self._drain(shares)
            self.commits.surely(consumer, shares)
        self._forget(shares)
        self._untaken.give_up(consumer, taken, is_eager=self._is_eager)

    def _on_lost(self, consumer: Any, taken: Sequence[TopicPartition]) -> None:
        """Others have them already."""
        log.warning("subscription %r: partitions were lost to others", self.subscription)
        self._forget(self._of(taken))
        self.commits.rebalanced(consumer)
        self._untaken.give_up(consumer, taken, is_eager=self._is_eager)

    def _of(self, places: Iterable[TopicPartition]) -> list[Share]:
        with self.changed:
            names = [(each.topic, each.partition) for each in places]
            return [self.shares[name] for name in names if name in self.shares]

    def _drain(self, shares: Sequence[Share]) -> None:
        until = time.monotonic() + DRAINS_S
        with self.changed:
            for share in shares:
                share.leaving = True
            while any(share.is_held for share in shares) and not self._stop.is_set():
                self._hear_of_itself()
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return
                self.changed.wait(min(left_s, self._stillness.most_s / 2))

    def _forget(self, shares: Sequence[Share]) -> None:
        with self.changed:
            for share in shares:
                self.shares.pop(share.name, None)
                self.by_generation.pop(share.generation, None)
                self._paused.discard(share.name)
            gone = {share.name for share in shares}
            # Behind these there is a gap, once it is this process's again.
            self._early = [
                each for each in self._early if (each.topic(), each.partition()) not in gone
            ]
            self.commits.lost()
            self.changed.notify_all()

    # --- for lanes

    def wake(self) -> None:
        """To be called before anything is claimed, with ``changed`` held: where this process stood
        still, others may have its partitions, and it has not been told yet.
        """
        if self._stillness:
            self._doubt()

    def _hear_of_itself(self) -> None:
        if self._stillness.hear():
            self._doubt()

    def _doubt(self) -> None:
        with self.changed:
            for share in self.shares.values():
                share.telling.doubt()
                share.version += 1  # or there would be nothing to ask the group

    def share_of(self, receipt: Any) -> Share | None:
        """The partition that a receipt is about, if it is still this process's. With ``changed``
        held, as what follows.
        """
        if not isinstance(receipt, Receipt) or receipt.intake != self.number:
            return None
        return self.by_generation.get(receipt.generation)

    def held(self, receipt: Any) -> tuple[Share, Item] | None:
        """What a receipt still holds."""
        share = self.share_of(receipt)
        if share is None:
            return None
        for run in share.runs.holding(receipt.token, (receipt.offset,)):
            share.open(run)
        item = share.items.get(receipt.offset)
        return None if item is None or item.token != receipt.token else (share, item)

    def held_of(self, receipt: SpanReceipt) -> tuple[list[tuple[Share, Run]], list[Receipt]]:
        """What the receipt of a span still holds as runs; and the receipts of all others of it,
        which are held one by one, or lost.
        """
        held: list[tuple[Share, Run]] = []
        rest: list[Receipt] = []
        for part in receipt.parts:
            generation, offsets = part
            mine = receipt.intake == self.number
            share = self.by_generation.get(generation) if mine else None
            found: list[Run] = []
            if share is not None:
                found = share.runs.holding(receipt.token, offsets)
                held += [(share, run) for run in found]
            if sum(map(len, found)) < len(offsets):
                there = {offset for run in found for offset in run.offsets}
                all_of = SpanReceipt(receipt.intake, receipt.token, (part,)).each()
                rest += [each for each in all_of if each.offset not in there]
        return held, rest

    def is_behind(self) -> bool:
        """Whether the cluster has more for this process than was fetched. Asks it."""
        with self.changed:
            fetched = {n: s.next for n, s in self.shares.items() if n not in self._paused}
        ends = self._admin.ends(fetched)
        return any(offset < ends[name] for name, offset in fetched.items())

    def look(self) -> None:
        """Ask the cluster whether the topics are still those that were assigned. A worker that
        went on in one that was made anew would pass over its first messages.
        """
        try:
            self._beginnings.look()
        except BrokerUnusable as error:
            self._end(str(error))

    def catch_up(self) -> None:
        """Commit a position that has moved though nobody has settled anything, past records of the
        log's own or what was rolled back: retention would overtake it. To be called now and then:
        where somebody settles, that is committed before the next time.
        """
        with self.changed:
            there = self.by_generation
            moved = {n: s.version for n, s in there.items() if s.committed < s.version}
            stay = [there[n] for n, version in moved.items() if self._moved.get(n) == version]
            stay = [share for share in stay if not share.busy]
            self._moved = moved
        if stay:
            self.commits.ask(stay)

    def tidy(self) -> None:
        """What was given again and is settled goes: its topic keeps everything otherwise."""
        with self.changed:
            share = self.shares.get((self.again, 0))
            safe = 0 if share is None else share.safe
        if safe > self._tidied:
            self._admin.delete_before(self.again, safe)
            self._tidied = safe

    # --- the end

    def abandon(self) -> None:
        """Leave without a word of what was settled or is held: as if it had died, but at once."""
        self._gone = True
        self.close()

    def close(self) -> None:
        """Hand over, and leave the group."""
        with self.changed:
            for share in self.shares.values():
                share.leaving = True
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LEAVES_S)
        with self.changed:
            self.changed.notify_all()

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

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from duly.broker import Start
from duly.brokers.kafka.address import Address
from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.assigned import Beginnings, made_anew
from duly.brokers.kafka.client import READ_COMMITTED, broker_error, settings
from duly.brokers.kafka.commits import Commits
from duly.brokers.kafka.fetched import Fetched
from duly.brokers.kafka.records import Records
from duly.brokers.kafka.share import Item, Order, Share
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable
from duly.guarantees import Guarantee
from duly.message import Topic

log = logging.getLogger("duly.kafka")

numbers = itertools.count(1)
"""What receipts name an intake by."""

_JOINS_S = 60.0
_ASKS_AGAIN_S = 0.5
_LEAVES_S = 15.0
_POLLS_S = 0.05
# Of a cluster that is away the driver tells many times a second.
_TELLS_S = 30.0
# How long a rebalance waits for handlers that run; what is not settled by then comes again.
DRAINS_S = 5.0
# Bodies that were fetched and wait; then fetching pauses until it is half of that.
_MOST_BYTES = 64 * 1024 * 1024

_CLASSIC = {"partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": "15000"}


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The receipt of a claim. ``generation`` is given to one assignment of one partition, and
    ``token`` to one claim.
    """

    intake: int
    generation: int
    offset: int
    token: int


class Intake:
    """``topics`` are those that it reads, by their names on the cluster; ``again`` is where what
    only this subscription is given stands.
    """

    def __init__(
        self,
        address: Address,
        admin: Admin,
        records: Callable[[], Records],
        subscription: str,
        group: str,
        guarantee: Guarantee,
        order: Order,
        again: str,
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
    ) -> None:
        self.number = next(numbers)
        self.subscription = subscription
        self.guarantee = guarantee
        self.order = order
        self.changed = threading.Condition()
        self.shares: dict[tuple[str, int], Share] = {}
        self.by_generation: dict[int, Share] = {}
        self.failed: BrokerError | None = None
        self.again = again
        self.fetched = Fetched(again, clock, wall_ms)
        self.commits = Commits(subscription, self.changed, self.by_generation, clock, wall_ms)
        self._admin = admin
        self._is_eager = address.is_eager
        self._topics: dict[str, Topic[Any]] = {}
        self._starts: dict[str, Start] = {}
        self._wanted = 0
        self._asked = 0
        self._joined = 0
        self._paused: set[tuple[str, int]] = set()
        self._stop = threading.Event()
        self._told_s = -math.inf
        self._tidied = 0
        self._gone = False  # as by the death of the process: nothing more is committed
        self._beginnings = Beginnings(admin, records, subscription, self._order_of, self._start_of)
        self._consumer: Any = Consumer(
            settings(
                {**({} if address.is_new_protocol else _CLASSIC), **address.consuming},
                {**READ_COMMITTED, "group.id": group, "on_commit": self.commits.answered},
            )
        )
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
                self._ask()
                self.commits.serve(self._consumer)
                first = self._consumer.poll(self._patience_s())
                if first is not None:
                    self._take([first, *self._consumer.consume(2000, 0)])
                self._press()
            self._leave()
        except Exception as error:
            log.exception("subscription %r: nothing more is fetched", self.subscription)
            self._fail(BrokerUnusable(f"subscription {self.subscription!r}: {error!r}"))
        finally:
            self.commits.end()
            self._consumer.close()

    def _patience_s(self) -> float:
        """How long to poll: whoever settles meanwhile waits for that, so it is a tenth of the time
        that nothing has happened for.
        """
        return min(_POLLS_S, max(0.001, (time.monotonic() - self.commits.active_s) / 10))

    def _leave(self) -> None:
        with self.changed:
            shares = list(self.shares.values())
        if not self._gone:
            self.commits.surely(self._consumer, shares)
        self._forget(shares)

    def _ask(self) -> None:
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
        with self.changed:
            for record in records:
                share = self.shares.get((record.topic(), record.partition()))
                error = record.error()
                if error is None:
                    if share is not None and record.offset() >= share.next:
                        self.fetched.into(share, record)
                elif error.code() == KafkaError._PARTITION_EOF:
                    if share is not None:
                        share.reached(record.offset())
                elif share is not None or error.fatal():
                    self._fail(self._gone_wrong(error, record))
                elif time.monotonic() > self._told_s + _TELLS_S:
                    self._told_s = time.monotonic()
                    log.warning("subscription %r: %s", self.subscription, error)
            self.changed.notify_all()

    def _gone_wrong(self, error: KafkaError, record: Any) -> BrokerError:
        where = f"topic {record.topic()!r}, partition {record.partition()}"
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            return BrokerUnusable(
                f"subscription {self.subscription!r}: {where} has nothing at the position that "
                f"this subscription has reached: {error.str()}. Retention went by, or the log "
                "lost its end or was made anew. Where to go on is a person's to say: "
                "kafka-consumer-groups.sh --reset-offsets"
            )
        return broker_error(error, f"subscription {self.subscription!r}: {where}")

    def _fail(self, error: BrokerError) -> None:
        with self.changed:
            self.failed = error
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
        places = [TopicPartition(share.name[0], share.name[1], share.next) for share in shares]
        if self._is_eager:
            consumer.assign(places)
        else:
            consumer.incremental_assign(places)

    def _begun(self, consumer: Any, given: Sequence[TopicPartition]) -> Sequence[Share]:
        """Where these go on; asked again while nobody answers: what is not assigned now, this
        generation is never given again.
        """
        until = time.monotonic() + _JOINS_S
        while not self._stop.is_set():
            try:
                return self._beginnings.of(consumer, given)
            except BrokerUnusable as error:
                self._fail(error)
                break
            except (BrokerError, KafkaException, KeyError) as error:
                if time.monotonic() > until:
                    text = f"subscription {self.subscription!r}: nobody knows where to go on"
                    self._fail(BrokerUnusable(f"{text}: {error!r}"))
                    break
                log.warning("subscription %r: asking again: %s", self.subscription, error)
                self._stop.wait(_ASKS_AGAIN_S)
        return []

    def _on_revoke(self, consumer: Any, taken: Sequence[TopicPartition]) -> None:
        """Hand over in an orderly way: what runs is settled first, as far as time allows."""
        shares = self._of(taken)
        if not self._gone:
            self._drain(shares)
            self.commits.surely(consumer, shares)
        self._forget(shares)
        if self._is_eager:
            consumer.unassign()
        else:
            consumer.incremental_unassign(list(taken))

    def _on_lost(self, consumer: Any, taken: Sequence[TopicPartition]) -> None:
        """Others have them already."""
        log.warning("subscription %r: partitions were lost to others", self.subscription)
        self._forget(self._of(taken))
        if self._is_eager:
            consumer.unassign()
        else:
            consumer.incremental_unassign(list(taken))

    def _of(self, places: Iterable[TopicPartition]) -> list[Share]:
        with self.changed:
            names = [(each.topic, each.partition) for each in places]
            return [self.shares[name] for name in names if name in self.shares]

    def _drain(self, shares: Sequence[Share]) -> None:
        until = time.monotonic() + DRAINS_S
        with self.changed:
            for share in shares:
                share.leaving = True
            while any(share.claimed for share in shares) and not self._stop.is_set():
                if not self.changed.wait(max(0.0, until - time.monotonic())):
                    return

    def _forget(self, shares: Sequence[Share]) -> None:
        with self.changed:
            for share in shares:
                self.shares.pop(share.name, None)
                self.by_generation.pop(share.generation, None)
                self._paused.discard(share.name)
            self.changed.notify_all()

    # --- for lanes

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
        item = None if share is None else share.items.get(receipt.offset)
        if share is None or item is None or item.token != receipt.token:
            return None
        return share, item

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
        with self.changed:
            logs = {name[0]: share.log for name, share in self.shares.items()}
        there = self._admin.find(logs)
        for topic, log in logs.items():
            if topic not in there or f"/{there[topic].id}/" not in log:
                self._fail(BrokerUnusable(made_anew(self.subscription, topic)))

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
        """Leave without a word about what was settled or is held, as the death of the process
        does, but at once.
        """
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

"""The ordered log in memory: partitions, offsets and consumer groups: admission by cursor."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from duly.broker import (
    Capabilities,
    Delivery,
    Outcome,
    Published,
    Receipt,
    SubscribeOptions,
    Subscription,
)
from duly.brokers.memory.entrance import Kept, MemoryEntrance
from duly.brokers.memory.history import History, newest
from duly.brokers.memory.lane import Clock, check_guarantee
from duly.brokers.memory.loggroup import LogGroup, key_lanes_of
from duly.brokers.memory.partition import Partition
from duly.brokers.memory.registry import Registry
from duly.brokers.memory.schedules import Reached
from duly.errors import BrokerUnavailable, ConfigurationError
from duly.guarantees import Settlement
from duly.inspection import DeadLetter, Incident, Selection, SubscriptionState
from duly.message import Message, Topic, now_ms, partition_of

_numbers = itertools.count(1)


class MemoryLog:
    """Topics as logs in partitions; a topic without order has one partition.

    Only a contiguous prefix of each partition is committed, a retry holds up its partition,
    and repeated publishes are not dropped: each stands at an offset of its own.
    """

    def __init__(
        self, *, clock: Clock = time.monotonic, wall_ms: Callable[[], int] = now_ms
    ) -> None:
        self._capabilities = Capabilities(
            name="in-memory log",
            is_log=True,
            durable=False,
            identity_retention=False,
            retries_in_place=True,
            delays=False,
            key_lanes=True,
            relays_once=True,
        )
        self.clock = clock
        self.wall_ms = wall_ms
        self.changed = threading.Condition(threading.RLock())
        self.history = History(wall_ms)
        self.groups: dict[str, LogGroup] = {}
        self.lanes: dict[int, LogLane] = {}
        self._registry = Registry(self._capabilities)
        self._partitions: dict[str, Sequence[Partition]] = {}
        self._name = f"memory-log:{next(_numbers)}"
        self._topic_numbers = itertools.count(1)
        self._tokens = itertools.count(1)
        self._kept: dict[str, Kept] = {}
        self._closed = False
        self._schedules = Reached(self.publish, self._registry.refusal)

    @property
    def capabilities(self) -> Capabilities:
        """What this broker provides."""
        return self._capabilities

    # --- topics

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Broker.declare`; ``partitions`` and ``guarantee`` of a topic are fixed."""
        with self.changed:
            for topic in self._registry.declare(topics):
                incarnation = f"{self._name}/{topic.name}#{next(self._topic_numbers)}"
                self._partitions[topic.name] = [
                    Partition(f"{incarnation}/{number}", topic.name, number, topic.retention_s)
                    for number in range(max(1, topic.partitions))
                ]

    def delete(self, topic: str) -> None:
        """Delete a topic with its messages; declared again it is another log."""
        with self.changed:
            self._registry.forget(topic)
            for partition in self._partitions.pop(topic):
                for group in self.groups.values():
                    group.forget(partition)
            self.changed.notify_all()

    def partitions(self, topic: str) -> Sequence[Partition]:
        """The partitions of a topic, for tests that leave gaps or lose the end of one."""
        self._registry.topic(topic)
        return self._partitions[topic]

    def truncate(self, topic: str, number: int, offset: int) -> None:
        """A partition loses what stands at and behind an offset, and begins a new epoch."""
        with self.changed:
            partition = self.partitions(topic)[number]
            partition.truncate(offset)
            for group in self.groups.values():
                for share in group.of(partition):
                    share.truncated()

    # --- publishing

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Broker.publish`."""
        with self.changed:
            self.check_open()
            outcomes = [self._append(message) for message in messages]
            self.changed.notify_all()
            return outcomes

    def _append(self, message: Message[Any]) -> Outcome:
        refusal = self._registry.refusal(message)
        if refusal is not None:
            return refusal
        partitions = self._partitions[message.topic]
        partitions[partition_of(message, len(partitions))].append(message, self.wall_ms())
        return Published(message.id)

    def entrance(self, outbox: str) -> MemoryEntrance:
        """As `PublishesOnce.entrance`."""
        with self.changed:
            kept = self._kept.setdefault(outbox, Kept())
        return MemoryEntrance(kept, self.changed, self.check_open, self._append)

    # --- subscribing

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> LogLane:
        """As `Broker.subscribe`. The lane joins the group, whose partitions are dealt anew."""
        with self.changed:
            self.check_open()
            partitions = [p for topic in topics for p in self.partitions(topic.name)]
            for topic in topics if options.order_by_key else ():
                self._check_order(self._registry.topic(topic.name), subscription)
            group = self.groups.get(subscription)
            if group is None:
                group = LogGroup(subscription, options, self.history)
                self.groups[subscription] = group
            check_guarantee(subscription, group.guarantee, options)
            _check_key_lanes(group, options)
            group.ordered, group.holds = options.order_by_key, options.hold_key_on_dead
            group.read(partitions, options)
            names = frozenset(topic.name for topic in topics)
            lane = LogLane(self, group, names, options, next(self._tokens))
            self.lanes[lane.number] = lane
            group.join(lane.number, names)
            self.changed.notify_all()
            return lane

    def _check_order(self, topic: Topic[Any], subscription: str) -> None:
        if topic.partitions == 0:
            raise ConfigurationError(
                f"subscription {subscription!r} asks for order by key, and topic "
                f"{topic.name!r} has no order: declare it with partitions=1 or more"
            )

    def claim(self, lane: LogLane, limit: int, max_bytes: int) -> Sequence[Delivery]:
        """What a lane may claim now. Call it with the lock held."""
        now = self.clock()
        lane.group.expire(now)
        if lane.number not in lane.group.members:
            lane.group.join(lane.number, lane.topics)
        return lane.group.take(
            lane.number,
            next(self._tokens),
            limit=limit,
            max_bytes=max_bytes,
            now=now,
            lease_s=lane.options.lease_s,
        )

    def settle(self, group: LogGroup, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """Settle for a group; returns the refused."""
        with self.changed:
            self.check_open()
            now = self.clock()
            refused = group.settle(settlements, now)
            for partition in {share.partition.whole for share in group.shares.values()}:
                self._let_go(partition, now)
            self.changed.notify_all()
            return refused

    def _let_go(self, partition: Partition, now: float) -> None:
        """What every subscription has committed may leave the log."""
        shares = [share for group in self.groups.values() for share in group.of(partition)]
        partition.committed(min(share.safe for share in shares), now)

    # --- what people and tests do

    def crash(self, lane: Subscription) -> None:
        """The worker behind a lane dies: nothing of it is settled, its flights are suspect."""
        if not isinstance(lane, LogLane):
            raise TypeError(f"{lane!r} is no lane of this broker")
        self.leave(lane, died=True)

    def leave(self, lane: LogLane, *, died: bool) -> None:
        """Take a lane out of its group: closed, or dead."""
        with self.changed:
            if self.lanes.pop(lane.number, None) is not None:
                lane.group.leave(lane.number, died=died)
                self.changed.notify_all()

    def reached(self, schedule: str, now_ms: int) -> int:
        """As `Ticking.reached`."""
        return self._schedules.reached(schedule, now_ms)

    def ticked(self) -> Mapping[str, int]:
        """As `Ticking.ticked`."""
        return self._schedules.ticked()

    def tick(
        self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Message[Any]]
    ) -> Sequence[Outcome] | None:
        """As `Ticking.tick`."""
        return self._schedules.tick(schedule, reached_ms, to_ms, messages)

    def record_drops(self, topic: str, count: int) -> None:
        """Make visible that at-most-once publishes were never stored."""
        with self.changed:
            self.history.dropped(topic, count)

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Mending.replay`.

        One that an exactly-once consumer admitted by cursor lies below it and has no effect.
        """
        return self._mend(letters, again=True)

    def discard(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Mending.discard`; a partition that waits behind one goes on."""
        return self._mend(letters, again=False)

    def keep_letters(self, letters: Sequence[DeadLetter]) -> None:
        """As `KeepsLetters.keep_letters`."""
        with self.changed:
            self.check_open()
            for letter in letters:
                if letter.subscription in self.groups:
                    self.groups[letter.subscription].keep(letter)

    def _mend(self, letters: Sequence[DeadLetter], *, again: bool) -> Sequence[DeadLetter]:
        with self.changed:
            self.check_open()
            gone = []
            for letter in letters:
                group = self.groups.get(letter.subscription)
                if group is None or not group.mend(letter, again=again):
                    gone.append(letter)
            self.changed.notify_all()
            return gone

    # --- looking inside

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """As `Inspection.subscriptions`."""
        with self.changed:
            now = self.clock()
            groups = [self.groups[name] for name in sorted(self.groups)]
            return [state for group in groups for state in group.states(now)]

    def dead_letters(
        self, subscription: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """As `Inspection.dead_letters`."""
        return self.select(Selection(subscription), limit)

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Mending.select`."""
        with self.changed:
            letters = [letter for group in self.groups.values() for letter in group.dead()]
            return newest(letters, which, limit)

    def incidents(
        self, subscription: str | None = None, kind: str | None = None, limit: int = 100
    ) -> Sequence[Incident]:
        """As `Inspection.incidents`."""
        with self.changed:
            return self.history.incidents(subscription, kind, limit)

    def incident_counts(self) -> Mapping[tuple[str, str], int]:
        """As `Inspection.incident_counts`."""
        with self.changed:
            return self.history.counts()

    def check_open(self) -> None:
        """Raise `BrokerUnavailable` once the broker is closed."""
        if self._closed:
            raise BrokerUnavailable(f"{self._capabilities.name} was closed; nothing was changed")

    def close(self) -> None:
        """Close every lane; nothing can be published or claimed after."""
        with self.changed:
            for lane in list(self.lanes.values()):
                self.leave(lane, died=False)
            self._closed = True
            self.changed.notify_all()


def _check_key_lanes(group: LogGroup, options: SubscribeOptions) -> None:
    if group.key_lanes != key_lanes_of(options):
        raise ConfigurationError(
            f"subscription {group.name!r} began with key_lanes={group.key_lanes}, and this "
            f"consumer declares key_lanes={options.key_lanes}: what took effect is remembered by "
            f"lane. Declare key_lanes={group.key_lanes}, or give the consumer a new name."
        )


class LogLane:
    """One lane of a consumer group; see `duly.broker.Subscription`."""

    def __init__(
        self,
        broker: MemoryLog,
        group: LogGroup,
        topics: frozenset[str],
        options: SubscribeOptions,
        number: int,
    ) -> None:
        self.group = group
        self.topics = topics
        self.options = options
        self.number = number
        self._broker = broker

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`. Waits in real time, whatever the injected clock says."""
        deadline = time.monotonic() + wait_s
        broker = self._broker
        with broker.changed:
            while self.number in broker.lanes:
                deliveries = broker.claim(self, limit, max_bytes)
                left = deadline - time.monotonic()
                if deliveries or left <= 0:
                    return deliveries
                broker.changed.wait(self._pause_s(left))
        return ()

    def _pause_s(self, left: float) -> float:
        event = self.group.next_event(self.number)
        if event is None:
            return left
        # Not 0: an injected clock that stands still would make this a busy loop.
        return min(left, max(event - self._broker.clock(), 0.001))

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """As `Subscription.settle`: what is done takes effect as far as the prefix reaches."""
        return self._broker.settle(self.group, settlements)

    def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
        """As `NotesRepeats.note_repeats`."""
        with self._broker.changed:
            self._broker.history.suppressed(self.group.name, deliveries)

    def extend(self, receipts: Iterable[Receipt], lease_s: float) -> Sequence[Receipt]:
        """As `Subscription.extend`."""
        with self._broker.changed:
            return self.group.extend(list(receipts), self._broker.clock() + lease_s)

    def close(self) -> None:
        """As `Subscription.close`: leave the group."""
        self._broker.leave(self, died=False)

"""Brokers in memory whose subscriptions are groups of claims: what they and their lanes share."""

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
from duly.brokers.memory.group import Group
from duly.brokers.memory.history import History, newest
from duly.brokers.memory.items import Claimed
from duly.brokers.memory.registry import Identities, Identity, Registry
from duly.brokers.memory.shelf import Shelf
from duly.errors import BrokerUnavailable, ConfigurationError, IdentityConflict, Superseded
from duly.guarantees import Settlement
from duly.inspection import DeadLetter, Incident, Selection, SubscriptionState
from duly.message import Message, Topic

Clock = Callable[[], float]


class Claims:
    """Topics, groups and claims of one broker in memory, under one lock.

    ``clock`` gives monotonic seconds: leases and due times go by it. ``wall_ms`` gives
    milliseconds since 1970 UTC: start times, retention of ids and what people read go by it.
    """

    def __init__(
        self, capabilities: Capabilities, clock: Clock, wall_ms: Callable[[], int]
    ) -> None:
        self.capabilities = capabilities
        self.clock = clock
        self.wall_ms = wall_ms
        self.changed = threading.Condition(threading.RLock())
        self.registry = Registry(capabilities)
        self.history = History(wall_ms)
        self.groups: dict[str, Group] = {}
        self.shelves: dict[str, Shelf] = {}
        self.lanes: dict[int, Lane] = {}
        self.loses: Callable[[Settlement], bool] | None = None
        self.closed = False
        self._identities = Identities(self.registry)
        self._positions = itertools.count(1)
        self._tokens = itertools.count(1)

    # --- publishing

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Broker.declare`."""
        with self.changed:
            for topic in self.registry.declare(topics):
                self.shelves[topic.name] = Shelf(topic.retention_s)

    def preview(
        self, messages: Sequence[Message[Any]], pending: dict[Identity, bytes]
    ) -> Sequence[Outcome]:
        """What `append` would answer; ``pending`` holds the ids of the open transaction."""
        with self.changed:
            return [self._judge(message, pending) for message in messages]

    def append(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Store messages; one outcome each, in order."""
        with self.changed:
            self.check_open()
            outcomes = [self._append(message) for message in messages]
            self.changed.notify_all()
            return outcomes

    def _judge(self, message: Message[Any], pending: dict[Identity, bytes] | None) -> Outcome:
        refusal = self.registry.refusal(message)
        if refusal is not None:
            return refusal
        earlier = None
        if self.capabilities.identity_retention:
            earlier = self._identities.check(message, self.wall_ms(), pending)
        return Published(message.id) if earlier is None else earlier

    def _append(self, message: Message[Any]) -> Outcome:
        outcome = self._judge(message, None)
        if not isinstance(outcome, Published):
            self.history.published(message, outcome)
            return outcome
        at_ms = self.wall_ms()
        self.shelves[message.topic].append(
            message,
            position=next(self._positions),
            stored_ms=at_ms,
            waiting=sum(message.topic in group.topics for group in self.groups.values()),
        )
        if self.capabilities.identity_retention:
            self._identities.remember(message, at_ms)
        return outcome

    # --- subscribing

    def join(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane:
        """A new lane of a subscription, which is made if it is new."""
        with self.changed:
            self.check_open()
            for topic in topics:
                self._check_order(self.registry.topic(topic.name), subscription, options)
            group = self.groups.get(subscription)
            if group is None:
                group = Group(subscription, options, self.history, self.wall_ms)
                self.groups[subscription] = group
            check_guarantee(subscription, group.guarantee, options)
            self._check_lanes(group, options)
            group.order(options.order_by_key, options.hold_key_on_dead)
            for topic in topics:
                if topic.name not in group.topics:
                    shelf = self.shelves[topic.name]
                    group.read(topic.name, shelf, shelf.enter(options.start))
            names = frozenset(topic.name for topic in topics)
            lane = Lane(self, group, names, options, next(self._tokens))
            self.lanes[lane.number] = lane
            return lane

    def _check_order(self, topic: Topic[Any], subscription: str, options: SubscribeOptions) -> None:
        if not options.order_by_key:
            return
        if not self.capabilities.orders_by_key:
            raise ConfigurationError(
                f"subscription {subscription!r} asks for order by key, and "
                f"{self.capabilities.name} has none: declare order_by_key=False, or use a "
                "broker that orders by key"
            )
        if topic.partitions == 0:
            raise ConfigurationError(
                f"subscription {subscription!r} asks for order by key, and topic "
                f"{topic.name!r} has no order: declare it with partitions=1 or more"
            )

    def _check_lanes(self, group: Group, options: SubscribeOptions) -> None:
        others = any(lane.group is group for lane in self.lanes.values())
        if others and options.order_by_key != group.ordered:
            raise ConfigurationError(
                f"subscription {group.name!r} is being worked with order_by_key={group.ordered}; "
                "lanes with and without order cannot work it side by side"
            )

    # --- claiming

    def claim(self, lane: Lane, limit: int, max_bytes: int) -> Sequence[Delivery]:
        """What a lane may claim now. Call it with the lock held."""
        return lane.group.take(
            lane.number,
            lane.topics,
            next(self._tokens),
            limit=limit,
            max_bytes=max_bytes,
            now=self.clock(),
            lease_s=lane.options.lease_s,
        )

    def commit(
        self,
        fence: Sequence[Receipt],
        settlements: Sequence[Settlement],
        messages: Sequence[Message[Any]],
        effects: Callable[[], None],
    ) -> None:
        """One transaction: its messages, settlements and effects, all of them or none.

        Raises `Superseded` where a receipt of ``fence`` is lost, and the `IdentityConflict` of
        a message whose id was taken by another body meanwhile.
        """
        with self.changed:
            self.check_open()
            self.check_held(fence)
            for message in messages:
                outcome = self._judge(message, None)
                if isinstance(outcome, IdentityConflict):
                    raise outcome
            effects()
            for message in messages:
                self._append(message)
            now = self.clock()
            for settlement in settlements:
                self.groups[settlement.receipt.subscription].settle([settlement], now)
            self.changed.notify_all()

    def check_held(self, receipts: Sequence[Receipt]) -> None:
        """Raise `Superseded` unless every receipt still holds its claim."""
        with self.changed:
            lost = [receipt for receipt in receipts if not self._holds(receipt)]
        if lost:
            raise Superseded(
                f"{len(lost)} of {len(receipts)} claims were lost to another worker, or their "
                "lease ended; nothing was committed"
            )

    def _holds(self, receipt: Receipt) -> bool:
        if not isinstance(receipt, Claimed):
            return False
        group = self.groups.get(receipt.subscription)
        return group is not None and group.held(receipt) is not None

    # --- what people do

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """As `Inspection.subscriptions`."""
        with self.changed:
            return [state for name in sorted(self.groups) for state in self.groups[name].states()]

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """As `Mending.select`."""
        with self.changed:
            letters = [letter for g in self.groups.values() for letter in g.dead.values()]
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

    def record_drops(self, topic: str, count: int) -> None:
        """Make visible that at-most-once publishes were never stored."""
        with self.changed:
            self.history.dropped(topic, count)

    def mend(self, letters: Sequence[DeadLetter], *, again: bool) -> Sequence[DeadLetter]:
        """As `Mending.replay` or, not ``again``, as `Mending.discard`."""
        with self.changed:
            self.check_open()
            gone = []
            for letter in letters:
                group = self.groups.get(letter.subscription)
                if group is None or not group.mend(letter, self.clock(), again=again):
                    gone.append(letter)
            self.changed.notify_all()
            return gone

    def leave(self, lane: Lane, *, crashed: bool) -> None:
        """Take a lane away: closed, or dead."""
        with self.changed:
            if self.lanes.pop(lane.number, None) is None:
                return
            if crashed:
                lane.group.crash(lane.number)
            else:
                lane.group.release(lane.number)
            self.changed.notify_all()

    def crash(self, lane: Subscription) -> None:
        """The worker behind a lane dies. Raises TypeError for another broker's lane."""
        if not isinstance(lane, Lane):
            raise TypeError(f"{lane!r} is no lane of this broker")
        self.leave(lane, crashed=True)

    def check_open(self) -> None:
        """Raise `BrokerUnavailable` once the broker is closed."""
        if self.closed:
            raise BrokerUnavailable(f"{self.capabilities.name} was closed; nothing was changed")

    def close(self) -> None:
        """Close every lane; nothing can be published or claimed after."""
        with self.changed:
            for lane in list(self.lanes.values()):
                self.leave(lane, crashed=False)
            self.closed = True
            self.changed.notify_all()


class Lane:
    """One lane's view of a subscription; see `duly.broker.Subscription`."""

    def __init__(
        self,
        broker: Claims,
        group: Group,
        topics: frozenset[str],
        options: SubscribeOptions,
        number: int,
    ) -> None:
        self.group = group
        self.topics = topics
        self.options = options
        self.number = number
        self._broker = broker

    @property
    def _open(self) -> bool:
        return self.number in self._broker.lanes

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """As `Subscription.claim`. Waits in real time, whatever the injected clock says."""
        deadline = time.monotonic() + wait_s
        broker = self._broker
        with broker.changed:
            while self._open:
                deliveries = broker.claim(self, limit, max_bytes)
                left = deadline - time.monotonic()
                if deliveries or left <= 0:
                    return deliveries
                broker.changed.wait(self._pause_s(left))
        return ()

    def _pause_s(self, left: float) -> float:
        """How long to wait before looking again; a change wakes earlier."""
        now = self._broker.clock()
        event = self.group.next_event(now)
        if event is None:
            return left
        # Not 0: an injected clock that stands still would make this a busy loop.
        return min(left, max(event - now, 0.001))

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """As `Subscription.settle`."""
        broker = self._broker
        with broker.changed:
            broker.check_open()
            if broker.loses is not None:
                settlements = [each for each in settlements if not broker.loses(each)]
            refused = self.group.settle(settlements, broker.clock())
            broker.changed.notify_all()
            return refused

    def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
        """As `NotesRepeats.note_repeats`."""
        with self._broker.changed:
            self._broker.history.suppressed(self.group.name, deliveries)

    def extend(self, receipts: Iterable[Receipt], lease_s: float) -> Sequence[Receipt]:
        """As `Subscription.extend`."""
        with self._broker.changed:
            return self.group.extend(list(receipts), self._broker.clock() + lease_s)

    def close(self) -> None:
        """As `Subscription.close`."""
        self._broker.leave(self, crashed=False)


def check_guarantee(subscription: str, recorded: str, options: SubscribeOptions) -> None:
    """Refuse a lane that declares another guarantee than the subscription was made with."""
    if recorded != options.guarantee:
        raise ConfigurationError(
            f"subscription {subscription!r} is recorded as {str(recorded)!r}, and this consumer "
            f"declares {str(options.guarantee)!r}. What was promised so far would no longer hold: "
            "give the consumer a new name, or declare the recorded guarantee."
        )

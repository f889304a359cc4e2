"""What a store in memory remembers about deliveries: the inbox and the cursors.

Each kind of admission is a small object that one session uses: it admits, hears how the
deliveries ended, and is applied with the commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from duly.broker import Delivery, LogPosition
from duly.errors import BrokerUnusable, ConfigurationError, Superseded
from duly.guarantees import Dead, Done, Retry, Settlement
from duly.store import Admitted, Scope, are_parked
from duly.store.parking import ParkedReceipt
from duly.stores.memory.parking import Rows, Settling


class Remembered(NamedTuple):
    """What the inbox knows of a message that took effect."""

    body_hash: bytes
    at_ms: int
    deaths: int = 0
    """Not 0: given up on instead, so often. Replayed as often, it may run again."""


class Cursor(NamedTuple):
    """How far a log has taken effect: the next offset, and the epoch of the one before."""

    next: int
    epoch: int


Event = tuple[str, str, str]
"""Topic, source and id. The topic belongs to the identity, as it does where it is published."""


def _event(delivery: Delivery) -> Event:
    message = delivery.message
    return (message.topic, message.source, message.id)


@dataclass(slots=True, eq=False)
class Memory:
    """The committed inbox (by consumer) and cursors (by consumer and log) of one store."""

    inbox: dict[str, dict[Event, Remembered]] = field(default_factory=dict)
    cursors: dict[tuple[str, str], Cursor] = field(default_factory=dict)
    dead: dict[tuple[str, str, int], Event] = field(default_factory=dict)
    """What a consumer gave up on, by consumer, log and offset."""
    parked: Rows = field(default_factory=Rows)

    def forget_dead(self, consumer: str, event: Event) -> None:
        """A person brought it back: a delivery of the log below the cursor is a repeat again."""
        for place, dead in [*self.dead.items()]:
            if place[0] == consumer and dead == event:
                del self.dead[place]


class ByInbox:
    """Admission of deliveries from a source without order: by what names the event."""

    def __init__(self, memory: Memory, scope: Scope, at_ms: int) -> None:
        self._scope = scope
        self._at_ms = at_ms
        self._inbox = memory.inbox.setdefault(scope.consumer, {})
        # Admitted here, with the receipt it came under: it is remembered only if that ends it.
        self._fresh: dict[Event, tuple[Delivery, Remembered]] = {}
        self._ended: dict[Event, Remembered] = {}

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """Sort deliveries into those that may run and those that may not."""
        kinds: dict[str, list[Delivery]] = {
            "fresh": [],
            "repeated": [],
            "conflicting": [],
            "too_old": [],
            "dead": [],
        }
        for delivery in deliveries:
            kinds[self._judge(delivery)].append(delivery)
        return Admitted(**kinds)

    def _judge(self, delivery: Delivery) -> str:
        message = delivery.message
        event = _event(delivery)
        now = Remembered(message.body_hash(), self._at_ms)
        known = self._inbox.get(event)
        if known is None and event in self._fresh:
            known = self._fresh[event][1]
        if known is not None and known.body_hash != now.body_hash:
            return "conflicting"
        if known is not None and delivery.replays < (known.deaths or delivery.replays + 1):
            return "dead" if known.deaths else "repeated"
        age_ms = self._at_ms - message.time_ms
        # Only the broker's own mark makes a stranger suspicious: a first delivery may be of any
        # age, after a long backlog.
        if delivery.repeated and age_ms > self._scope.inbox_retention_s * 1000:
            return "too_old"
        self._fresh[event] = (delivery, now)
        return "fresh"

    def settle(self, settlement: Settlement, delivery: Delivery) -> None:
        """Hear how a delivery ended: what is done or dead will be remembered."""
        event = _event(delivery)
        admitted = self._fresh.get(event)
        if admitted is None or admitted[0].receipt != delivery.receipt:
            return
        if isinstance(settlement, Done):
            self._ended[event] = admitted[1]
        elif isinstance(settlement, Dead):
            # Who lost its claim to the one that gave up must not commit after all.
            self._ended[event] = admitted[1]._replace(deaths=delivery.replays + 1)

    def check(self) -> None:
        """One writer at a time: nobody else can have inserted these ids."""

    def apply(self) -> None:
        """Remember what has ended, forget what is older than the retention."""
        for event, remembered in self._ended.items():
            self._inbox.pop(event, None)  # to the end: the oldest stand in front
            self._inbox[event] = remembered
        oldest_ms = self._at_ms - self._scope.inbox_retention_s * 1000
        while self._inbox:
            event = next(iter(self._inbox))
            if self._inbox[event].at_ms >= oldest_ms:
                return
            del self._inbox[event]


class ByCursor:
    """Admission of deliveries from ordered logs: by the next offset of each. What is to be tried
    again is parked, where the scope says so, and admitted by its token from then on.
    """

    def __init__(self, memory: Memory, scope: Scope, at_ms: int) -> None:
        self._memory = memory
        self._consumer = scope.consumer
        self._parks = scope.parks
        self._at_ms = at_ms
        self._parked = Settling(memory.parked, scope.consumer)
        self._read: dict[str, Cursor | None] = {}
        self._moved: dict[str, Cursor] = {}
        self._dead: dict[tuple[str, str, int], Event] = {}
        # What was admitted of each log and is not settled yet, in order.
        self._admitted: dict[str, deque[int]] = {}

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """Those below the cursor have taken effect; the others may run. So may what was parked.

        Raises `BrokerUnusable` where the log is not the one that the cursor was kept for, and
        `Superseded`.
        """
        if are_parked(deliveries):
            return self._parked.admit(deliveries)
        fresh: list[Delivery] = []
        repeated: list[Delivery] = []
        dead: list[Delivery] = []
        reached: dict[str, int] = {}
        for delivery in deliveries:
            position = _position(delivery)
            cursor = self._cursor(position.log)
            if cursor is not None:
                self._check_history(position, cursor)
            start = reached.get(position.log, cursor.next if cursor else 0)
            if position.offset < start:
                # Replayed, it would change the order of the log: it has no effect.
                given_up = not delivery.replays and self._gave_up(position)
                (dead if given_up else repeated).append(delivery)
            else:
                fresh.append(delivery)
                reached[position.log] = position.offset + 1
                self._admitted.setdefault(position.log, deque()).append(position.offset)
        return Admitted(fresh, repeated, dead=dead)

    def _gave_up(self, position: LogPosition) -> bool:
        return (self._consumer, position.log, position.offset) in self._memory.dead

    def _cursor(self, log: str) -> Cursor | None:
        if log not in self._read:
            self._read[log] = self._memory.cursors.get((self._consumer, log))
        return self._read[log]

    def _check_history(self, position: LogPosition, cursor: Cursor) -> None:
        where = f"consumer {self._consumer!r}, log {position.log!r}"
        advice = (
            "The log lost messages that had taken effect, or is another one. Nothing was run; "
            "find out what it holds before you remove the cursor."
        )
        if position.end is not None and cursor.next > position.end:
            raise BrokerUnusable(
                f"{where}: the cursor stands at {cursor.next}, beyond the log's end at "
                f"{position.end}. {advice}"
            )
        ahead = position.offset >= cursor.next
        if ahead and position.epoch < cursor.epoch:
            raise BrokerUnusable(
                f"{where}: offset {position.offset} is of epoch {position.epoch}, and epoch "
                f"{cursor.epoch} has taken effect before it. {advice}"
            )
        if not ahead and position.epoch > cursor.epoch:
            raise BrokerUnusable(
                f"{where}: offset {position.offset} below the cursor at {cursor.next} was "
                f"written anew in epoch {position.epoch}. {advice}"
            )

    def settle(self, settlement: Settlement, delivery: Delivery) -> None:
        """Move the cursor past what is done, dead or parked; only a prefix of each log can be."""
        position = _position(delivery)
        if isinstance(settlement, Dead):
            self._dead[self._consumer, position.log, position.offset] = _event(delivery)
        if isinstance(delivery.receipt, ParkedReceipt):
            self._parked.settle(settlement, delivery, self._at_ms)
            return
        cursor = self._cursor(position.log)
        if cursor is not None and position.offset < cursor.next:
            return
        admitted = self._admitted.get(position.log, deque())
        parks = self._parks and isinstance(settlement, Retry)
        if not (parks or isinstance(settlement, Done | Dead)):
            admitted.clear()  # nothing of this log may pass what is not done
            return
        if not admitted or admitted.popleft() != position.offset:
            raise ValueError(
                f"log {position.log!r}: offset {position.offset} cannot be settled, one before "
                "it is not done: by cursor, settlements cover a prefix"
            )
        self._moved[position.log] = Cursor(position.offset + 1, position.epoch)
        if isinstance(settlement, Retry):
            self._parked.park(settlement, delivery, position, self._at_ms)

    def check(self) -> None:
        """Compare before set. Raises `Superseded` where another transaction moved the cursor."""
        for log, read in self._read.items():
            if self._memory.cursors.get((self._consumer, log)) != read:
                raise Superseded(
                    f"consumer {self._consumer!r}: the cursor of log {log!r} was moved by another "
                    "worker; nothing was committed"
                )
        self._parked.check()

    def apply(self) -> None:
        """Set the cursors, park and end."""
        self._parked.apply()
        self._memory.dead.update(self._dead)
        for log, cursor in self._moved.items():
            self._memory.cursors[self._consumer, log] = cursor


def _position(delivery: Delivery) -> LogPosition:
    if delivery.position is None:
        raise ConfigurationError(
            f"message {delivery.message.id!r} has no position in a log: admission by cursor "
            "needs a broker that is one"
        )
    return delivery.position

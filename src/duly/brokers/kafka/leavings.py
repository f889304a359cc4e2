"""`Leavings`: what relays that are dead left open among the messages of their outbox.

Kafka ends it, or whoever takes over does; where Kafka forgets that (`transactions`), readers of
what is committed would stay before it for ever. Nobody is told whether such a transaction was
committed. But who is about to publish a message knows that it is not published, for the last note
says so. So of what stood in its topic before this relay published anything there, a record of that
very message is to be undone: now, or whenever readers come to stay before it, which they may do
only once what somebody else has open before it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.client import broker_error, log, reading
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.brokers.kafka.wire import headers_in
from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable

# So many may have died one after the other without having published anything.
_PREDECESSORS = 16
# A batch of theirs is no larger: its messages are the first that are published here.
_FIRST = 20_000
# Readers that stay before what somebody else has open are looked after so seldom.
_AGAIN_S = 5.0
# How long a publish may be held up, which a relay does for less than its lease; and for how long
# none is made at all as long as it cannot be told where a topic ends.
_TAKES_S, _INSISTS_S = 3.0, 60.0

Place = tuple[str, int]
Identity = tuple[bytes, bytes]


class Leavings:
    """``called`` gives the producer of a number; they are open under those before ``number``, which
    is the first of this relay's.
    """

    def __init__(
        self,
        address: Address,
        admin: Admin,
        called: Callable[[int], TransactionalProducer],
        number: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._admin = admin
        self._called = called
        self._numbers = range(number - 1, max(-1, number - 1 - _PREDECESSORS), -1)
        self._clock = clock
        self._insists_until = clock() + _INSISTS_S
        # Of each topic where its partitions ended before anything was published here, as far as
        # readers have not come there yet; and when to look whether they have.
        self._before: dict[str, Mapping[Place, int]] = {}
        self._look_at: dict[str, float] = {}
        self._unpublished: set[Identity] = set()

    def end(self, sendings: Sequence[Sending]) -> None:
        """End what is open of these, and of those that were given before, before these are
        published. Raises `BrokerUnavailable`: they are not to be published yet.
        """
        new = {each.topic for each in sendings} - self._before.keys()
        if new:
            self._mark(new)
        if not any(self._before.values()):
            self._unpublished.clear()
            return
        if len(self._unpublished) < _FIRST:
            self._unpublished.update([_identity(each.headers) for each in sendings])
        try:
            self._look()
        except BrokerError as error:
            log.info("Kafka: what relays before this one left open is not known yet: %s", error)

    def _mark(self, topics: Collection[str]) -> None:
        """Note where these end: what is behind is published by this relay, or after it began."""
        try:
            ends = self._admin.held_up(topics)
        except BrokerUnusable as error:
            log.warning("Kafka: what relays before this one left open is not seen: %s", error)
            ends = {}
        except BrokerError as error:
            if self._clock() < self._insists_until:
                raise BrokerUnavailable(f"nothing was published: {error}") from error
            log.warning("Kafka: what relays before this one left open is not known: %s", error)
            ends = {}
        for topic in topics:
            self._before[topic] = {
                place: end for place, (_, end) in ends.items() if place[0] == topic
            }
            self._look_at[topic] = self._clock()

    def _look(self) -> None:
        now = self._clock()
        due = [
            topic for topic, ends in self._before.items() if ends and self._look_at[topic] <= now
        ]
        if not due:
            return
        self._look_at |= dict.fromkeys(due, now + _AGAIN_S)
        for number in self._numbers:
            if not (places := self._still_open(due)):
                return
            if self._clock() > now + _TAKES_S:
                self._look_at |= dict.fromkeys(due, now)
                return
            log.warning("Kafka: readers stay before what is not published: %s", places)
            with closing(self._called(number)) as before:
                before.end_records(places)
            # Its end takes a moment: who looks whether they move waits for that.
            self._admin.standing({topic for topic, _ in places})

    def _still_open(self, topics: Collection[str]) -> list[Place]:
        """Where readers stay before a message that was not published when it was stored."""
        held = self._admin.held_up(topics)
        ends: dict[Place, int] = {}
        for topic in topics:
            before = self._before[topic].items()
            self._before[topic] = {p: end for p, end in before if p in held and held[p][0] < end}
            ends |= self._before[topic]
        told = self._first({place: held[place][0] for place in ends})
        return [
            place
            for place, (offset, identity) in told.items()
            if offset < ends[place] and identity in self._unpublished
        ]

    def _first(self, stays: Mapping[Place, int]) -> Mapping[Place, tuple[int, Identity]]:
        """What stands at each of these, or is the next, as far as it is told in time."""
        found: dict[Place, tuple[int, Identity]] = {}
        if not stays:
            return found
        until = self._clock() + _TAKES_S
        more = {"isolation.level": "read_uncommitted"}
        try:
            reader: Any = Consumer({**reading(self._address, "leavings"), **more})
            with closing(reader):
                reader.assign([TopicPartition(*place, at) for place, at in stays.items()])
                while len(found) < len(stays) and self._clock() < until:
                    for record in reader.consume(500, 0.2):
                        place = record.topic(), record.partition()
                        error = record.error()
                        if error is None:
                            what = record.offset(), _identity(headers_in(record))
                            found.setdefault(place, what)
                        elif error.code() != KafkaError._PARTITION_EOF:
                            raise KafkaException(error)
        except KafkaException as error:
            raise broker_error(error, "open records were not read") from error
        return found


def _identity(headers: Iterable[tuple[str, Any]]) -> Identity:
    of = dict(headers)
    return of.get("ce_source", b""), of.get("ce_id", b"")

"""`Leavings`: what relays that are dead left open among the messages of their outbox.

Kafka ends it, or whoever takes over does; where Kafka forgets that (`transactions`), readers of
what is committed would stay before it for ever. Nobody is told whether such a transaction was
committed. But who is about to publish a message knows that it is not published, for the last note
says so: where the record before which readers stay is of one of those, it is to be undone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.admin import Admin
from duly.brokers.kafka.client import broker_error, log, reading
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import BrokerError, BrokerUnavailable

# Of a batch that was larger than the next one the rest follows.
_LOOKS = 5
# So many may have died one after the other without having published anything.
_PREDECESSORS = 16
_ANSWERS_S = 10.0

Place = tuple[str, int]
Identity = tuple[bytes, bytes]


class Leavings:
    """``called`` gives the producer of a number; they are open under those before ``number``."""

    def __init__(
        self,
        address: Address,
        admin: Admin,
        called: Callable[[int], TransactionalProducer],
        number: int,
    ) -> None:
        self._address = address
        self._admin = admin
        self._called = called
        self._numbers = range(number - 1, max(-1, number - 1 - _PREDECESSORS), -1)
        self._looks: Counter[str] = Counter()

    def end(self, sendings: Sequence[Sending]) -> None:
        """End what is open of these, before they are published. Where that fails they are
        published all the same, and somebody looks again with the next.
        """
        topics = {each.topic for each in sendings if self._looks[each.topic] < _LOOKS}
        if not topics:
            return
        self._looks.update(topics)
        try:
            self._end({_identity(each.headers) for each in sendings}, topics)
        except BrokerError as error:
            log.warning("Kafka: what relays before this one left open is not known: %s", error)

    def _end(self, unpublished: Collection[Identity], topics: set[str]) -> None:
        for number in self._numbers:
            standing = self._admin.standing(topics)
            self._looks.update(dict.fromkeys(topics - {name for name, _ in standing}, _LOOKS))
            places = [
                place
                for place, found in self._first(standing)
                if found is not None and found in unpublished
            ]
            if not places:
                return
            with closing(self._called(number)) as before:
                log.warning("Kafka: readers stay before what is not published: %s", places)
                before.end_records(places)

    def _first(self, standing: Mapping[Place, int]) -> Iterator[tuple[Place, Identity | None]]:
        """What stands at each of these, by its identity."""
        for (topic, partition), offset in standing.items():
            more = {"isolation.level": "read_uncommitted"}
            reader = Consumer({**reading(self._address, topic), **more})
            with closing(reader):
                reader.assign([TopicPartition(topic, partition, offset)])
                yield (topic, partition), _next(reader)


def _next(reader: Any) -> Identity | None:
    """The identity of the next record; None: there is none, or it has none."""
    until = time.monotonic() + _ANSWERS_S
    while time.monotonic() < until:
        record = reader.poll(0.5)
        if record is None:
            continue
        if (error := record.error()) is None:
            return _identity(record.headers() or ())
        if error.code() == KafkaError._PARTITION_EOF:
            return None
        raise broker_error(KafkaException(error), "an open record was not read")
    raise BrokerUnavailable("an open record was not read: Kafka did not answer")


def _identity(headers: Iterable[tuple[str, Any]]) -> Identity:
    of = dict(headers)
    return of.get("ce_source", b""), of.get("ce_id", b"")

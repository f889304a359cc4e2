"""The raw loops on Kafka: confluent-kafka as one would use it by hand, each under 40 lines.

The same idempotent producer with the same headers, batches whose position is committed once, the
same codec and handlers. They know no retries, dead letters, leases, rebalances or lost positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg
from confluent_kafka import Consumer, Producer, TopicPartition
from kafka_place import Both
from postgres_work import charge, check_charges, create_charges, load
from workload import BATCH, WARM, Order, Sample, Stopwatch, ignore, in_batches, measured, orders

from duly.identity import new_ids

CURSOR = "create table cursors (part integer primary key, next bigint not null)"
MOVE = "update cursors set next = %s where part = 0 and next = %s"

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode


class Tx:
    """What the handlers take instead of `duly.Transaction`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection


def headers_of(id: str) -> list[tuple[str, str | bytes | None]]:
    """Those of a new event, as duly gives it."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return [
        ("duly", b"1"),
        ("ce_specversion", b"1.0"),
        ("ce_id", id.encode()),
        ("ce_source", b"shop"),
        ("ce_time", now.encode()),
        ("ce_type", b"orders"),
    ]


def refuse_nameless(record: Any) -> None:
    """What says nothing of which event it is would be handled like any other."""
    if not dict(record.headers() or ()).get("ce_id"):
        raise RuntimeError(f"offset {record.offset()} has no id")


class Confirmed:
    """Publishes in batches: all of one is on its way, then all of it is confirmed."""

    def __init__(self, place: Both, topic: str) -> None:
        surely = {"enable.idempotence": True, "acks": "all"}
        self._producer = Producer({"bootstrap.servers": place.bootstrap, **surely})
        self._topic = topic
        self._confirmed = self._sent = 0

    def _on_delivery(self, error: Any, _record: Any) -> None:
        if error is not None:
            raise RuntimeError(error)
        self._confirmed += 1

    def publish(self, batch: Sequence[bytes]) -> None:
        produce, topic, called = self._producer.produce, self._topic, self._on_delivery
        for id, body in zip(new_ids(len(batch)), batch, strict=True):
            produce(topic, body, headers=headers_of(id), on_delivery=called)
        self._sent += len(batch)
        self._producer.flush(30)
        if self._confirmed < self._sent:
            raise TimeoutError(f"{self._confirmed} of {self._sent} were confirmed")


def publish(place: str, messages: int, size: int = BATCH) -> Sample:
    at = Both.named(place)
    confirmed = Confirmed(at, at.topic())
    for batch in in_batches(orders(WARM if size > 1 else 100), size):
        confirmed.publish([encode(order) for order in batch])
    rest = orders(messages, WARM)
    with measured(messages) as sample:
        for batch in in_batches(rest, size):
            confirmed.publish([encode(order) for order in batch])
    return sample


def filled(place: Both, messages: int) -> str:
    """A topic with so many messages."""
    topic = place.topic()
    confirmed = Confirmed(place, topic)
    for batch in in_batches(orders(messages), 5000):
        confirmed.publish([encode(order) for order in batch])
    return topic


def consumer_of(place: Both, topic: str) -> Any:
    """A member of a group, with the topic."""
    settings = {"auto.offset.reset": "earliest", "enable.auto.commit": False}
    # Or it pauses for a second with every 100,000 messages.
    settings |= {"fetch.queue.backoff.ms": 20}
    group = f"{place.namespace}.raw"
    consumer = Consumer({"bootstrap.servers": place.bootstrap, "group.id": group, **settings})
    consumer.subscribe([topic])
    return consumer


Run = Callable[[Sequence[bytes], int, int], None]
"""Given the bodies of a batch, its first offset, and the one behind its last."""


def consume(
    place: Both, messages: int, run: Run, *, waits: bool = True, named: bool = False
) -> Sample:
    """A batch is fetched, run, and its position committed; ``waits``: for the answer to that.
    ``named``: each record is to have an id.
    """
    topic = filled(place, WARM + messages)
    consumer = consumer_of(place, topic)
    watch, done, until = Stopwatch(messages), 0, time.monotonic() + 200
    while done < WARM + messages:
        if time.monotonic() > until:
            raise TimeoutError(f"only {done} messages were handled")
        batch = consumer.consume(min(BATCH, WARM - done) if done < WARM else BATCH, 1.0)
        if not batch:
            continue
        bodies = []
        for record in batch:
            if record.error() is not None:
                raise RuntimeError(record.error())
            if named:
                refuse_nameless(record)
            bodies.append(record.value())
        behind = batch[-1].offset() + 1
        run(bodies, batch[0].offset(), behind)
        consumer.commit(offsets=[TopicPartition(topic, 0, behind)], asynchronous=not waits)
        done += len(batch)
        if done == WARM:
            watch.start()
    watch.stop()
    consumer.close()
    return watch.sample


def consume_empty(place: str, messages: int, *, named: bool = False) -> Sample:
    def run(bodies: Sequence[bytes], _first: int, _behind: int) -> None:
        for body in bodies:
            ignore(decode(body))

    return consume(Both.named(place), messages, run, named=named)


def consume_and_charge(
    place: str, messages: int, *, by_cursor: bool, together: bool = False
) -> Sample:
    """One inserted row a message, or one statement a batch, one commit a batch; ``by_cursor``:
    with the position moved in it, and then Kafka's own is for show.
    """
    at = Both.named(place)
    create_charges(at.database)
    with psycopg.connect(at.database) as connection:
        connection.execute(CURSOR)
        connection.execute("insert into cursors values (0, 0)")
        connection.commit()

        def run(bodies: Sequence[bytes], first: int, behind: int) -> None:
            if by_cursor and not connection.execute(MOVE, (behind, first)).rowcount:
                raise RuntimeError("another has moved the cursor")
            found = [decode(body) for body in bodies]
            if together:
                load(found, Tx(connection))
            else:
                for order in found:
                    charge(order, Tx(connection))
            connection.commit()

        sample = consume(at, messages, run, waits=not by_cursor)
    check_charges(at.database, WARM + messages)
    return sample

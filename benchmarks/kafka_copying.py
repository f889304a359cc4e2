"""From one topic of Kafka's to another: a message of 1 KB comes and goes once, by each guarantee.

duly through its public API, and loops by hand, each under 40 lines. What arrived is counted
afterwards, by who reads only what is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from confluent_kafka import Consumer, Producer, TopicPartition
from kafka_own import app_at
from kafka_place import Both
from kafka_raw import Confirmed, consumer_of, headers_of, refuse_nameless
from own import work
from workload import BATCH, BIG_BATCH, WARM, Order, Sample, Stopwatch, in_batches, orders

import duly
from duly.identity import new_ids

IN = duly.Topic("orders", Order, guarantee="at-least-once", partitions=1)
OUT = duly.Topic("copies", Order, guarantee="at-least-once", partitions=1)
LOSSY = duly.Topic("copies", Order, guarantee="at-most-once", partitions=1)
# Enough for the longest of the transactions measured; of a partition 8,192 are claimed at a time.
MOST = 20_000
BYTES = 64 * 1024 * 1024

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode


def large(count: int, first: int = 0) -> list[Order]:
    """Orders of 1,000 bytes of JSON."""
    found = orders(count, first)
    for order in found:
        order.address = order.address.ljust(len(order.address) + 800, ".")
    return found


def _fill(app: duly.App, messages: int) -> None:
    for batch in in_batches(large(messages), BIG_BATCH):
        app.publish_many(IN, batch)


def at_most_once(place: str, messages: int) -> Sample:
    """Positions first, then into a buffer that drops what does not fit."""
    with app_at(place, effects=False) as app:

        @app.consumer(IN, name="copy", guarantee="at-most-once", batch=BATCH)
        def copy(order: Order) -> None:
            app.publish(LOSSY, order)

        _fill(app, WARM + messages)
        return work(app, "copy", messages, WARM)


def at_least_once(place: str, messages: int) -> Sample:
    """A batch is published and confirmed, then its position committed."""
    with app_at(place, effects=False) as app:

        @app.batch_consumer(IN, name="copy", guarantee="at-least-once", batch=BATCH)
        def copy(batch: list[Order]) -> None:
            app.publish_many(OUT, batch)

        _fill(app, WARM + messages)
        sample = work(app, "copy", messages, WARM)
    check(Both.named(place), WARM + messages)
    return sample


def exactly_once(place: str, messages: int, tx_s: float) -> Sample:
    """Transactions of Kafka's, each of so many seconds."""
    with app_at(place, effects=False) as app:

        @app.consumer(
            IN, name="copy", guarantee="exactly-once", batch=MOST, batch_bytes=BYTES, tx_s=tx_s
        )
        def copy(order: Order, tx: duly.Transaction[Any]) -> None:
            tx.publish(OUT, order)

        _fill(app, WARM + messages)
        sample = work(app, "copy", messages, WARM)
    check(Both.named(place), WARM + messages)
    return sample


# --- by hand


def _filled(place: Both, messages: int) -> str:
    topic = place.topic()
    confirmed = Confirmed(place, topic)
    for batch in in_batches(large(messages), BIG_BATCH):
        confirmed.publish([encode(order) for order in batch])
    return topic


def raw_at_least_once(place: str, messages: int) -> Sample:
    at = Both.named(place)
    topic = _filled(at, WARM + messages)
    consumer, confirmed = consumer_of(at, topic), Confirmed(at, at.topic("copies"))
    watch, done = Stopwatch(messages), 0
    while done < WARM + messages:
        batch = consumer.consume(min(BATCH, WARM - done) if done < WARM else BATCH, 1.0)
        if not batch:
            continue
        confirmed.publish([encode(decode(record.value())) for record in batch])
        behind = [TopicPartition(topic, 0, batch[-1].offset() + 1)]
        consumer.commit(offsets=behind, asynchronous=False)
        done += len(batch)
        if done == WARM:
            watch.start()
    watch.stop()
    consumer.close()
    check(at, WARM + messages)
    return watch.sample


def as_they_came(records: Sequence[Any]) -> Sequence[Any]:
    """The headers of copies that pass for the same events."""
    return [record.headers() for record in records]


def as_new(records: Sequence[Any]) -> Sequence[Any]:
    """Those of copies that are events of their own, of records that each have an id."""
    for record in records:
        refuse_nameless(record)
    return [headers_of(id) for id in new_ids(len(records))]


def raw_exactly_once(
    place: str,
    messages: int,
    tx_s: float,
    headers_for: Callable[[Sequence[Any]], Sequence[Any]] = as_they_came,
) -> Sample:
    at = Both.named(place)
    topic, copies = _filled(at, WARM + messages), at.topic("copies")
    consumer = consumer_of(at, topic)
    named = {"bootstrap.servers": at.bootstrap, "transactional.id": at.namespace}
    producer: Any = Producer(named)
    producer.init_transactions(30)
    watch, done = Stopwatch(messages), 0
    while done < WARM + messages:
        producer.begin_transaction()
        until, behind = time.monotonic() + tx_s, 0
        stop = WARM if done < WARM else WARM + messages
        while done < stop and time.monotonic() < until:
            batch = consumer.consume(min(BATCH, stop - done), 0.01)
            for record, headers in zip(batch, headers_for(batch), strict=True):
                producer.produce(copies, encode(decode(record.value())), headers=headers)
            producer.poll(0)
            if batch:
                behind, done = batch[-1].offset() + 1, done + len(batch)
        if behind:
            places = [TopicPartition(topic, 0, behind)]
            producer.send_offsets_to_transaction(places, consumer.consumer_group_metadata(), 30)
        producer.commit_transaction(30)
        if done == WARM:
            watch.start()
    watch.stop()
    consumer.close()
    check(at, WARM + messages)
    return watch.sample


def check(place: Both, count: int) -> None:
    """Each message arrived once; a fast row that loses or repeats is no result."""
    settings = {"auto.offset.reset": "earliest", "enable.partition.eof": True}
    group = {"bootstrap.servers": place.bootstrap, "group.id": f"{place.namespace}.check"}
    consumer = Consumer({**group, **settings, "isolation.level": "read_committed"})
    consumer.assign([TopicPartition(f"{place.namespace}.copies", 0, 0)])
    seen: list[str] = []
    while True:
        records: Sequence[Any] = consumer.consume(5000, 5.0)
        seen += [decode(r.value() or b"").order_id for r in records if r.error() is None]
        if not records or any(record.error() is not None for record in records):
            break
    consumer.close()
    if (len(seen), len(set(seen))) != (count, count):
        raise AssertionError(f"{len(seen)} copies of {len(set(seen))} orders, {count} were there")

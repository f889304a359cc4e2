"""The raw loops on RabbitMQ: py-amqp as one would use it by hand, each under 40 lines.

The same quorum queue, confirmed publishing, batches acknowledged with one frame, the same codec and
handlers. They know no retries, dead letters, leases, lost connection or second subscription.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import amqp
import msgspec
import psycopg
from amqp import spec
from postgres_work import charge, check_charges, create_charges, load
from rabbitmq_place import Both
from workload import BATCH, WARM, Order, Sample, Stopwatch, ignore, in_batches, measured, orders

from duly.identity import new_ids

QUEUE = "orders"
QUORUM = {"x-queue-type": "quorum"}
INBOX = "create table inbox (id text primary key)"
ONCE = "insert into inbox select unnest(%s::text[]) on conflict do nothing returning id"

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode


class Tx:
    """What the handlers take instead of `duly.Transaction`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection


@contextmanager
def channel_at(place: Both) -> Iterator[Any]:
    connection = amqp.Connection(place.parts["host"], virtual_host=place.parts["vhost"])
    connection.connect()
    try:
        channel = connection.channel()
        channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=QUORUM)
        yield channel
    finally:
        connection.close()


class Confirmed:
    """Publishes in a pipeline: a batch is on its way, then all of it is confirmed."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._sent = self._confirmed = 0
        channel.confirm_select()
        channel.events["basic_ack"].add(self._on_ack)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        # In order, on one queue: what a tag confirms is confirmed up to it or by its own.
        self._confirmed = max(self._confirmed, tag) if multiple else self._confirmed + 1

    def publish(self, batch: Sequence[Order]) -> None:
        for id, order in zip(new_ids(len(batch)), batch, strict=True):
            message: Any = amqp.Message
            body = message(encode(order), message_id=id, delivery_mode=2)
            # Not basic_publish: that looks for news from the server each time, and is half as fast.
            self._channel.send_method(
                spec.Basic.Publish, "Bssbb", (0, "", QUEUE, True, False), body
            )
        self._sent += len(batch)
        while self._confirmed < self._sent:
            self._channel.connection.drain_events()


def publish(place: str, messages: int, size: int = BATCH) -> Sample:
    with channel_at(Both.named(place)) as channel:
        confirmed = Confirmed(channel)
        for batch in in_batches(orders(WARM if size > 1 else 100), size):
            confirmed.publish(batch)
        rest = orders(messages, WARM)
        with measured(messages) as sample:
            for batch in in_batches(rest, size):
                confirmed.publish(batch)
        return sample


Run = Callable[[Sequence[Any]], None]
"""Given the messages of a batch."""


def consume(place: str, messages: int, run: Run, size: int = BATCH) -> Sample:
    """Deliveries are collected to batches, and a batch is acknowledged with one frame."""
    warm = WARM if size > 1 else 100
    with channel_at(Both.named(place)) as channel:
        confirmed = Confirmed(channel)
        for some in in_batches(orders(warm + messages), BATCH):
            confirmed.publish(some)
        batch: list[Any] = []
        channel.basic_qos(0, 2 * size, False)
        channel.basic_consume(QUEUE, callback=batch.append)
        watch, done = Stopwatch(messages), 0
        while done < warm + messages:
            if done == warm:
                watch.start()
            while len(batch) < size:
                channel.connection.blocking_read()
            taken = batch[:size]
            del batch[:size]
            run(taken)
            channel.basic_ack(taken[-1].delivery_tag, multiple=True)
            done += size
        watch.stop()
        return watch.sample


def consume_empty(place: str, messages: int) -> Sample:
    def run(batch: Sequence[Any]) -> None:
        for message in batch:
            ignore(decode(message.body))

    return consume(place, messages, run)


def consume_and_charge(
    place: str, messages: int, *, by_inbox: bool, together: bool = False
) -> Sample:
    """One inserted row a message, or one statement a batch, one commit a batch; ``by_inbox``:
    with the ids remembered in it.
    """
    database = Both.named(place).database
    create_charges(database)
    with psycopg.connect(database) as connection:
        if by_inbox:
            connection.execute(INBOX)
            connection.commit()

        def run(batch: Sequence[Any]) -> None:
            if by_inbox:
                ids = [message.properties["message_id"] for message in batch]
                fresh = {id for (id,) in connection.execute(ONCE, (ids,)).fetchall()}
                batch = [m for m in batch if m.properties["message_id"] in fresh]
            found = [decode(message.body) for message in batch]
            if together:
                load(found, Tx(connection))
            else:
                for order in found:
                    charge(order, Tx(connection))
            connection.commit()

        sample = consume(place, messages, run)
    check_charges(database, WARM + messages)
    return sample

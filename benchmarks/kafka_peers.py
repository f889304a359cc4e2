"""FastStream, by both drivers that it has, and Quix Streams on the same node, at the settings that
do best here.

All at-least-once: positions are committed after the handler, publishing is confirmed. None has
exactly-once effects in a database: their rows with an inserted row do what their users write for
it, a dedup row by the message's id in the transaction of the effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import msgspec
import psycopg
from kafka_place import Both
from kafka_raw import filled
from postgres_work import CHARGE, check_charges, create_charges
from psycopg_pool import AsyncConnectionPool
from rabbitmq_peers import DEDUP, ONCE, WARM, Counted, charged_once
from workload import BATCH, Order, Sample, in_batches, measured, orders

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode

Handle = Callable[[Order], Awaitable[None]]


async def nothing(_order: Order) -> None:
    """The empty handler."""


# --- FastStream


def _broker(place: Both, driver: str) -> Any:
    if driver == "confluent":
        from faststream.confluent import KafkaBroker as ByConfluent

        return ByConfluent(place.bootstrap, acks="all", enable_idempotence=True, logger=None)
    from faststream.kafka import KafkaBroker

    # Or a batch of 500 does not fit into one.
    surely: Any = {"acks": "all", "enable_idempotence": True, "max_batch_size": 1_000_000}
    return KafkaBroker(place.bootstrap, logger=None, **surely)


async def _publish_all(broker: Any, topic: str, count: int, size: int, first: int = 0) -> None:
    for batch in in_batches(orders(count, first), size):
        if size > 1:
            await broker.publish_batch(*(encode(order) for order in batch), topic=topic)
        else:
            await broker.publish(encode(batch[0]), topic, headers={"ce_id": str(uuid4())})


def faststream_publish(place: str, messages: int, driver: str, size: int = BATCH) -> Sample:
    both = Both.named(place)
    topic = both.topic()

    async def run() -> Sample:
        async with _broker(both, driver) as broker:
            await broker.start()
            await _publish_all(broker, topic, WARM if size > 1 else 100, size)
            with measured(messages) as sample:
                await _publish_all(broker, topic, messages, size, WARM)
            return sample

    return asyncio.run(run())


def faststream_consume(place: str, messages: int, driver: str, *, by_batches: bool) -> Sample:
    run = _consume(Both.named(place), messages, driver, nothing, by_batches=by_batches)
    return asyncio.run(run)


def faststream_charge(place: str, messages: int, driver: str) -> Sample:
    both = Both.named(place)
    create_charges(both.database)
    with psycopg.connect(both.database) as connection:
        connection.execute(DEDUP)

    async def run() -> Sample:
        async with AsyncConnectionPool(both.database, min_size=2, max_size=2) as pool:

            async def handle(order: Order) -> None:
                async with pool.connection() as connection:
                    if (await connection.execute(ONCE, (order.order_id,))).rowcount:
                        await connection.execute(CHARGE, (order.order_id, order.cents))

            return await _consume(both, messages, driver, handle, by_batches=True)

    sample = asyncio.run(run())
    check_charges(both.database, WARM + messages)
    return sample


async def _consume(
    place: Both, messages: int, driver: str, handle: Handle, *, by_batches: bool
) -> Sample:
    """A message a call, or up to ``BATCH`` of them, which commits their position once."""
    from faststream import AckPolicy

    topic = filled(place, WARM + messages)
    broker, counted = _broker(place, driver), Counted(messages)
    most = {"batch": True, "max_records": BATCH} if by_batches else {}

    async def work(message: Any) -> None:
        for body in message.body if by_batches else [message.body]:
            await handle(decode(body))
            counted.one()

    if driver == "confluent":
        from faststream.confluent import KafkaMessage as Given
    else:
        from faststream.kafka import KafkaMessage as Given  # type: ignore[assignment]
    work.__annotations__["message"] = Given
    broker.subscriber(
        topic,
        group_id=f"{place.namespace}.peer",
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
        **most,
    )(work)
    async with broker:
        await broker.start()
        return await asyncio.to_thread(counted.wait)


# --- Quix Streams


class _Ended(Exception):
    """Everything was handled."""


def quix_consume(place: str, messages: int) -> Sample:
    return _quix(Both.named(place), messages, lambda _order: None)


def quix_charge(place: str, messages: int) -> Sample:
    both = Both.named(place)
    create_charges(both.database)
    with psycopg.connect(both.database) as connection:
        connection.execute(DEDUP)
        connection.commit()

        def handle(order: Order) -> None:
            charged_once(connection, order.order_id, order)
            connection.commit()

        sample = _quix(both, messages, handle)
    check_charges(both.database, WARM + messages)
    return sample


def _quix(place: Both, messages: int, handle: Callable[[Order], None]) -> Sample:
    from quixstreams import Application  # type: ignore[import-not-found, unused-ignore]

    topic = filled(place, WARM + messages)
    app = Application(
        broker_address=place.bootstrap,
        consumer_group=f"{place.namespace}.peer",
        auto_offset_reset="earliest",
        processing_guarantee="at-least-once",
        commit_every=BATCH,
        commit_interval=60.0,
        loglevel=None,
        use_changelog_topics=False,
    )
    counted = Counted(messages)

    def work(body: bytes) -> None:
        handle(decode(body))
        counted.one()
        if counted.over.is_set():
            raise _Ended

    frame = app.dataframe(app.topic(topic, value_deserializer="bytes"))
    frame.update(work)
    with suppress(_Ended):
        app.run()
    return counted.wait()

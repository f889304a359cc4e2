"""FastStream, Dramatiq and Celery on the same node, at the settings that do best here.

All at-least-once: acknowledged after the handler, on durable queues, publishing confirmed. None has
exactly-once effects: their rows with an inserted row do what their users write for it, a dedup row
by the message's id in the transaction of the effect.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import msgspec
import psycopg
from postgres_work import CHARGE, check_charges, create_charges
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from rabbitmq_place import Both
from workload import BATCH, Order, Sample, Stopwatch, in_batches, measured, orders

WARM = 500
THREADS = 8
POOL = 10
DEDUP = "create table if not exists handled (id text primary key)"
ONCE = "insert into handled values (%s) on conflict do nothing"
LONGEST_S = 200.0

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode


def charged_once(connection: Any, id: str, order: Order) -> None:
    """One inserted row a message, and the memory of the message in the same transaction."""
    if connection.execute(ONCE, (id,)).rowcount:
        connection.execute(CHARGE, (order.order_id, order.cents))


def create_effects(database: str) -> None:
    create_charges(database)
    with psycopg.connect(database) as connection:
        connection.execute(DEDUP)


def nothing(_id: str, _order: Order) -> None:
    """The empty handler."""


def nothing_of(_body: str) -> None:
    """What is only sent, and not handled."""


class Counted:
    """Starts the clock after the warm-up and stops it at the end. From any thread."""

    def __init__(self, messages: int) -> None:
        self._all = WARM + messages
        self._done = 0
        self._lock = threading.Lock()
        self.watch = Stopwatch(messages)
        self.over = threading.Event()

    def one(self) -> None:
        with self._lock:
            self._done += 1
            if self._done == WARM:
                self.watch.start()
            elif self._done == self._all:
                self.watch.stop()
                self.over.set()

    def wait(self) -> Sample:
        if not self.over.wait(LONGEST_S):
            raise TimeoutError(f"only {self._done} messages were handled")
        return self.watch.sample


# --- FastStream


def _faststream(place: Both) -> tuple[Any, Any]:
    from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

    channel = Channel(prefetch_count=2 * BATCH)
    broker = RabbitBroker(place.amqp, default_channel=channel, logger=None)
    return broker, RabbitQueue("orders", durable=True, queue_type=QueueType.QUORUM)


async def _publish_all(broker: Any, queue: Any, count: int, size: int, first: int = 0) -> None:
    for batch in in_batches(orders(count, first), size):
        await asyncio.gather(
            *(
                broker.publish(
                    encode(order), queue, message_id=str(uuid4()), persist=True, mandatory=True
                )
                for order in batch
            )
        )


def faststream_publish(place: str, messages: int, size: int = BATCH) -> Sample:
    async def run() -> Sample:
        broker, queue = _faststream(Both.named(place))
        async with broker:
            await broker.declare_queue(queue)
            await _publish_all(broker, queue, WARM if size > 1 else 100, size)
            with measured(messages) as sample:
                await _publish_all(broker, queue, messages, size, WARM)
            return sample

    return asyncio.run(run())


def faststream_consume(place: str, messages: int) -> Sample:
    async def nothing(_id: str, _order: Order) -> None:
        pass

    return asyncio.run(_faststream_consume(Both.named(place), messages, nothing))


def faststream_charge(place: str, messages: int) -> Sample:
    both = Both.named(place)
    create_effects(both.database)

    async def run() -> Sample:
        async with AsyncConnectionPool(both.database, min_size=POOL, max_size=POOL) as pool:

            async def handle(id: str, order: Order) -> None:
                async with pool.connection() as connection:
                    if (await connection.execute(ONCE, (id,))).rowcount:
                        await connection.execute(CHARGE, (order.order_id, order.cents))

            return await _faststream_consume(both, messages, handle)

    sample = asyncio.run(run())
    check_charges(both.database, WARM + messages)
    return sample


async def _faststream_consume(
    place: Both, messages: int, handle: Callable[[str, Order], Awaitable[None]]
) -> Sample:
    from faststream import AckPolicy
    from faststream.rabbit import RabbitMessage

    broker, queue = _faststream(place)
    counted = Counted(messages)

    @broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)  # type: ignore[untyped-decorator, unused-ignore]
    async def work(message: RabbitMessage) -> None:
        await handle(message.message_id, decode(message.body))
        counted.one()

    async with broker:
        await broker.declare_queue(queue)
        await _publish_all(broker, queue, WARM + messages, BATCH)
        await broker.start()
        return await asyncio.to_thread(counted.wait)


# --- Dramatiq


def _dramatiq(place: Both) -> Any:
    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    logging.getLogger("dramatiq").setLevel(logging.CRITICAL)
    return RabbitmqBroker(url=place.amqp, confirm_delivery=True, middleware=[])


def dramatiq_publish(place: str, messages: int) -> Sample:
    import dramatiq

    broker = _dramatiq(Both.named(place))
    actor = dramatiq.actor(actor_name="order", broker=broker)(nothing_of)
    for order in orders(100):
        actor.send(encode(order).decode())
    rest = orders(messages, WARM)
    with measured(messages) as sample:
        for order in rest:
            actor.send(encode(order).decode())
    broker.close()
    return sample


def dramatiq_consume(place: str, messages: int) -> Sample:
    return _dramatiq_consume(place, messages, nothing)


def dramatiq_charge(place: str, messages: int) -> Sample:
    database = Both.named(place).database
    create_effects(database)
    with ConnectionPool(database, min_size=POOL, max_size=POOL) as pool:

        def handle(id: str, order: Order) -> None:
            with pool.connection() as connection:
                charged_once(connection, id, order)

        sample = _dramatiq_consume(place, messages, handle)
    check_charges(database, WARM + messages)
    return sample


def _dramatiq_consume(place: str, messages: int, handle: Callable[[str, Order], None]) -> Sample:
    import dramatiq

    broker = _dramatiq(Both.named(place))
    counted = Counted(messages)

    def work(body: str) -> None:
        order = decode(body)
        handle(order.order_id, order)
        counted.one()

    actor = dramatiq.actor(actor_name="order", broker=broker)(work)
    for order in orders(WARM + messages):
        actor.send(encode(order).decode())
    worker = dramatiq.Worker(broker, worker_threads=THREADS)
    worker.start()
    try:
        return counted.wait()
    finally:
        worker.stop()
        broker.close()


# --- Celery


def _celery(place: Both) -> Any:
    from celery import Celery

    app = Celery("orders", broker=place.amqp)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_default_queue="orders",
        task_default_queue_type="quorum",
        worker_detect_quorum_queues=True,
        broker_transport_options={"confirm_publish": True},
        worker_prefetch_multiplier=64,
        worker_hijack_root_logger=False,
    )
    return app


def celery_publish(place: str, messages: int) -> Sample:
    app = _celery(Both.named(place))
    task = app.task(name="order")(nothing_of)
    for order in orders(100):
        task.delay(encode(order).decode())
    rest = orders(messages, WARM)
    with measured(messages) as sample:
        for order in rest:
            task.delay(encode(order).decode())
    return sample


def celery_consume(place: str, messages: int) -> Sample:
    return _celery_consume(place, messages, nothing)


def celery_charge(place: str, messages: int) -> Sample:
    database = Both.named(place).database
    create_effects(database)
    with ConnectionPool(database, min_size=POOL, max_size=POOL) as pool:

        def handle(id: str, order: Order) -> None:
            with pool.connection() as connection:
                charged_once(connection, id, order)

        sample = _celery_consume(place, messages, handle)
    check_charges(database, WARM + messages)
    return sample


def _celery_consume(place: str, messages: int, handle: Callable[[str, Order], None]) -> Sample:
    from celery.contrib.testing.worker import start_worker

    app = _celery(Both.named(place))
    counted = Counted(messages)

    def work(body: str) -> None:
        order = decode(body)
        handle(order.order_id, order)
        counted.one()

    task = app.task(name="order")(work)
    for order in orders(WARM + messages):
        task.delay(encode(order).decode())
    worker: Any = start_worker(
        app, pool="threads", concurrency=THREADS, perform_ping_check=False, loglevel="CRITICAL"
    )
    # It may take longer to shut down than it is given, which is not measured.
    with suppress(RuntimeError), worker:
        counted.wait()
    return counted.watch.sample

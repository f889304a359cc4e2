"""duly on PostgreSQL, through its public API: the same messages and handlers as the raw loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
from own import CALLERS, fill, work
from postgres_work import (
    CHARGE,
    IN_FLIGHT,
    acharge,
    charge,
    check_charges,
    create_charges,
    load,
    wait,
)
from workload import BATCH, WARM, Order, Sample, in_batches, measured, orders

import duly
from duly.brokers.memory import MemoryQueue
from duly.guarantees import GuaranteeName
from duly.stores.postgres import PostgresStore

# What is done with is deleted, as the raw loops do.
LEAST = duly.Topic("orders", Order, guarantee="at-least-once")
EXACTLY = duly.Topic("checkout", Order, guarantee="exactly-once")

Declare = Callable[[duly.App], Any]


@contextmanager
def app_at(url: str) -> Iterator[duly.App]:
    """An app whose broker and store are this database."""
    app = duly.App("shop", broker=url)
    try:
        yield app
    finally:
        app.close()


# --- publishing


def publish(url: str, messages: int, topic: duly.Topic[Order] = LEAST) -> Sample:
    """``publish_many`` in batches."""
    with app_at(url) as app:
        warm, rest = orders(WARM), orders(messages, WARM)
        for batch in in_batches(warm, BATCH):
            app.publish_many(topic, batch)
        with measured(messages) as sample:
            for batch in in_batches(rest, BATCH):
                app.publish_many(topic, batch)
        return sample


def publish_singly(url: str, messages: int, topic: duly.Topic[Order] = LEAST) -> Sample:
    """One caller, a message a call, each durable on return."""
    with app_at(url) as app:
        for order in orders(100):
            app.publish(topic, order)
        rest = orders(messages, WARM)
        with measured(messages) as sample:
            for order in rest:
                app.publish(topic, order)
        return sample


def publish_from_threads(url: str, messages: int) -> Sample:
    """50 threads, a message a call."""
    each = messages // CALLERS
    with app_at(url) as app:
        ready = threading.Barrier(CALLERS + 1)

        def call(mine: Sequence[Order]) -> None:
            app.publish(LEAST, mine[0])
            ready.wait()
            for order in mine[1:]:
                app.publish(LEAST, order)

        threads = [
            threading.Thread(target=call, args=(orders(each + 1, n * (each + 1)),))
            for n in range(CALLERS)
        ]
        for thread in threads:
            thread.start()
        ready.wait()
        with measured(each * CALLERS) as sample:
            for thread in threads:
                thread.join()
        return sample


def publish_from_tasks(url: str, messages: int) -> Sample:
    """50 tasks of one event loop, a message a call."""
    each = messages // CALLERS

    async def call(app: duly.App, mine: Sequence[Order]) -> None:
        for order in mine:
            await app.apublish(LEAST, order)

    async def everybody(app: duly.App) -> Sample:
        await asyncio.gather(*(call(app, orders(2, n)) for n in range(CALLERS)))
        shares = [orders(each, n * each) for n in range(CALLERS)]
        with measured(each * CALLERS) as sample:
            await asyncio.gather(*(call(app, share) for share in shares))
        return sample

    with app_at(url) as app:
        return asyncio.run(everybody(app))


# --- consuming


def nothing(order: Order) -> None:
    """The empty handler."""


def nothing_within(order: Order, tx: duly.Transaction[Any]) -> None:
    """The empty handler, in a transaction."""


def consume_empty(url: str, messages: int, guarantee: GuaranteeName) -> Sample:
    """The empty handler under each guarantee."""
    with app_at(url) as app:
        match guarantee:
            case "at-most-once":
                app.consumer(LEAST, name="empty", guarantee="at-most-once", batch=BATCH)(nothing)
            case "at-least-once":
                app.consumer(LEAST, name="empty", guarantee="at-least-once", batch=BATCH)(nothing)
            case "exactly-once":
                app.consumer(LEAST, name="empty", guarantee="exactly-once", batch=BATCH)(
                    nothing_within
                )
        fill(app, LEAST, WARM + messages)
        return work(app, "empty", messages, WARM)


def consume_waiting(url: str, messages: int, batch: int = 100) -> Sample:
    """Async handlers that wait 10 ms, 500 at a time; ``batch``: at most so many a claim."""
    with app_at(url) as app:
        app.consumer(
            LEAST, name="waiting", guarantee="at-least-once", concurrency=IN_FLIGHT, batch=batch
        )(wait)
        fill(app, LEAST, WARM + messages)
        return work(app, "waiting", messages, WARM)


def consume_and_charge(url: str, messages: int, batch: int = BATCH) -> Sample:
    """Exactly-once, one inserted row a message."""
    return _effects(url, messages, one_by_one(batch=batch), warm_for(batch))


def aconsume_and_charge(url: str, messages: int) -> Sample:
    """The same by an ``async def`` handler."""
    return _effects(url, messages, awaited())


def consume_and_load(url: str, messages: int) -> Sample:
    """Exactly-once, a batch handler with one statement."""
    return _effects(url, messages, together)


def one_by_one(batch: int = BATCH, **options: Any) -> Declare:
    def declare(app: duly.App) -> None:
        app.consumer(EXACTLY, name="billing", guarantee="exactly-once", batch=batch, **options)(
            charge
        )

    return declare


def awaited(**options: Any) -> Declare:
    def declare(app: duly.App) -> None:
        app.consumer(EXACTLY, name="billing", guarantee="exactly-once", batch=BATCH, **options)(
            acharge
        )

    return declare


def together(app: duly.App) -> None:
    app.batch_consumer(EXACTLY, name="billing", guarantee="exactly-once", batch=BATCH)(load)


def _effects(url: str, messages: int, declare: Declare, warm: int = WARM) -> Sample:
    create_charges(url)
    with app_at(url) as app:
        declare(app)
        fill(app, EXACTLY, warm + messages)
        sample = work(app, "billing", messages, warm)
    check_charges(url, warm + messages)
    return sample


def warm_for(batch: int) -> int:
    return batch * max(1, WARM // batch) if batch > 1 else 100


# --- at-least-once, with the handler's own transaction


def consume_at_least_once(url: str, messages: int, batch: int = BATCH) -> Sample:
    """The same row a message, committed once a batch; settled in a second durable commit."""
    create_charges(url)
    warm = warm_for(batch)
    with app_at(url) as app, psycopg.connect(url) as effects:
        done = 0

        @app.consumer(LEAST, name="billing", guarantee="at-least-once", batch=batch)
        def handle(order: Order) -> None:
            nonlocal done
            effects.execute(CHARGE, (order.order_id, order.cents))
            done += 1
            if done % batch == 0:
                effects.commit()

        fill(app, LEAST, warm + messages)
        sample = work(app, "billing", messages, warm)
    check_charges(url, warm + messages)
    return sample


def aconsume_at_least_once(url: str, messages: int) -> Sample:
    """The same by an ``async def`` handler."""
    create_charges(url)
    with app_at(url) as app:
        connection: psycopg.AsyncConnection[Any] | None = None
        done = 0

        @app.consumer(LEAST, name="billing", guarantee="at-least-once", batch=BATCH)
        async def handle(order: Order) -> None:
            nonlocal connection, done
            if connection is None:
                connection = await psycopg.AsyncConnection.connect(url)
            await connection.execute(CHARGE, (order.order_id, order.cents))
            done += 1
            if done % BATCH == 0:
                await connection.commit()

        fill(app, LEAST, WARM + messages)
        sample = work(app, "billing", messages, WARM)
    check_charges(url, WARM + messages)
    return sample


# --- as a store beside another broker


def by_inbox(url: str, messages: int, declare: Declare, delay_s: float = 0.0) -> Sample:
    """Effects here, the broker in memory. ``delay_s``: how far away the server is, one way."""
    create_charges(url)
    with ExitStack() as stack:
        near = url
        if delay_s:
            from postgres_place import at_a_distance

            url = stack.enter_context(at_a_distance(url, delay_s))
        store = PostgresStore(url)
        stack.callback(store.close)
        app = stack.enter_context(duly.App("shop", broker=MemoryQueue(), store=store))
        declare(app)
        fill(app, EXACTLY, WARM + messages)
        sample = work(app, "billing", messages, WARM)
    check_charges(near, WARM + messages)
    return sample

"""duly on RabbitMQ, effects in PostgreSQL, through its public API: as the raw loops do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from own import fill, work
from postgres_work import CHARGE, LOAD, charge, check_charges, columns, create_charges, load
from rabbitmq_place import Both
from workload import BATCH, WARM, Order, Sample, in_batches, measured, orders

import duly

LEAST = duly.Topic("orders", Order, guarantee="at-least-once")
EXACTLY = duly.Topic("checkout", Order, guarantee="exactly-once")


@contextmanager
def app_at(place: str, *, effects: bool = True) -> Iterator[duly.App]:
    both = Both.named(place)
    app = duly.App("shop", broker=both.amqp, store=both.database if effects else None)
    try:
        yield app
    finally:
        app.close()


def ignored(app: duly.App, batch: int = BATCH) -> None:
    """A consumer that does nothing: without one nobody would keep what is published."""

    @app.consumer(LEAST, name="empty", guarantee="at-least-once", batch=batch)
    def nothing(order: Order) -> None:
        pass


def publish(place: str, messages: int, size: int = BATCH) -> Sample:
    """``publish_many`` in batches, or one message a call."""
    with app_at(place, effects=False) as app:
        ignored(app)
        for batch in in_batches(orders(WARM if size > 1 else 100), size):
            app.publish_many(LEAST, batch)
        rest = orders(messages, WARM)
        with measured(messages) as sample:
            for batch in in_batches(rest, size):
                app.publish_many(LEAST, batch)
        return sample


def consume_empty(place: str, messages: int) -> Sample:
    """The empty handler, at-least-once."""
    with app_at(place, effects=False) as app:
        ignored(app)
        fill(app, LEAST, WARM + messages)
        return work(app, "empty", messages, WARM)


def consume_exactly(place: str, messages: int, *, together: bool = False) -> Sample:
    """Exactly-once by inbox: one inserted row a message, or a batch handler."""
    database = Both.named(place).database
    create_charges(database)
    with app_at(place) as app:
        if together:
            app.batch_consumer(EXACTLY, name="billing", guarantee="exactly-once", batch=BATCH)(load)
        else:
            app.consumer(EXACTLY, name="billing", guarantee="exactly-once", batch=BATCH)(charge)
        fill(app, EXACTLY, WARM + messages)
        sample = work(app, "billing", messages, WARM)
    check_charges(database, WARM + messages)
    return sample


def consume_at_least(place: str, messages: int, *, together: bool = False) -> Sample:
    """The same effects, committed once a batch by the handlers themselves."""
    database = Both.named(place).database
    create_charges(database)
    with app_at(place, effects=False) as app, psycopg.connect(database) as effects:
        (_one_batch if together else _one_by_one)(app, effects)
        fill(app, LEAST, WARM + messages)
        sample = work(app, "billing", messages, WARM)
    check_charges(database, WARM + messages)
    return sample


def _one_batch(app: duly.App, effects: Any) -> None:
    @app.batch_consumer(LEAST, name="billing", guarantee="at-least-once", batch=BATCH)
    def handle(batch: list[Order]) -> None:
        effects.execute(LOAD, columns(batch))
        effects.commit()


def _one_by_one(app: duly.App, effects: Any) -> None:
    done = 0

    @app.consumer(LEAST, name="billing", guarantee="at-least-once", batch=BATCH)
    def handle(order: Order) -> None:
        nonlocal done
        effects.execute(CHARGE, (order.order_id, order.cents))
        done += 1
        if done % BATCH == 0:
            effects.commit()

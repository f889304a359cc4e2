"""duly on Kafka, effects in PostgreSQL, through its public API: as the raw loops do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from kafka_place import Both
from own import work
from postgres_work import (
    CHARGE,
    LOAD,
    charge,
    charge_slowly,
    check_charges,
    columns,
    create_charges,
    load,
)
from workload import (
    BATCH,
    BIG_BATCH,
    WARM,
    Order,
    Sample,
    ignore,
    in_batches,
    measured,
    orders,
)

import duly
from duly.guarantees import GuaranteeName

SLOW_WARM = 200
LEAST = duly.Topic("orders", Order, guarantee="at-least-once", partitions=1)


@contextmanager
def app_at(place: str, *, effects: bool = True) -> Iterator[duly.App]:
    both = Both.named(place)
    app = duly.App("shop", broker=both.kafka, store=both.database if effects else None)
    try:
        yield app
    finally:
        app.close()


def publish(place: str, messages: int, size: int = BATCH) -> Sample:
    """``publish_many`` in batches, or one message a call."""
    with app_at(place, effects=False) as app:
        for batch in in_batches(orders(WARM if size > 1 else 100), size):
            app.publish_many(LEAST, batch)
        rest = orders(messages, WARM)
        with measured(messages) as sample:
            for batch in in_batches(rest, size):
                app.publish_many(LEAST, batch)
        return sample


def fill(app: duly.App, messages: int) -> None:
    for batch in in_batches(orders(messages), BIG_BATCH):
        app.publish_many(LEAST, batch)


def consume_empty(place: str, messages: int, guarantee: GuaranteeName = "at-least-once") -> Sample:
    """The empty handler."""
    with app_at(place, effects=False) as app:
        if guarantee == "at-most-once":
            app.consumer(LEAST, name="empty", guarantee="at-most-once", batch=BATCH)(ignore)
        else:
            app.consumer(LEAST, name="empty", guarantee="at-least-once", batch=BATCH)(ignore)
        fill(app, WARM + messages)
        return work(app, "empty", messages, WARM)


def consume_exactly(place: str, messages: int, *, together: bool = False) -> Sample:
    """Exactly-once by cursor: one inserted row a message, or a batch handler."""
    database = Both.named(place).database
    create_charges(database)
    with app_at(place) as app:
        if together:
            app.batch_consumer(LEAST, name="billing", guarantee="exactly-once", batch=BATCH)(load)
        else:
            app.consumer(LEAST, name="billing", guarantee="exactly-once", batch=BATCH)(charge)
        fill(app, WARM + messages)
        sample = work(app, "billing", messages, WARM)
    check_charges(database, WARM + messages)
    return sample


def consume_slowly(place: str, messages: int, key_lanes: int) -> Sample:
    """Exactly-once by cursor with a slow statement a message, in so many lanes of keys."""
    database = Both.named(place).database
    create_charges(database)
    with app_at(place) as app:
        app.consumer(
            LEAST, name="billing", guarantee="exactly-once", batch=50,
            lanes=key_lanes, key_lanes=key_lanes,
        )(charge_slowly)  # fmt: skip
        fill(app, SLOW_WARM + messages)
        sample = work(app, "billing", messages, SLOW_WARM)
    check_charges(database, SLOW_WARM + messages)
    return sample


def consume_at_least(place: str, messages: int, *, together: bool = False) -> Sample:
    """The same effects, committed once a batch by the handlers themselves."""
    database = Both.named(place).database
    create_charges(database)
    with app_at(place, effects=False) as app, psycopg.connect(database) as effects:
        (_one_batch if together else _one_by_one)(app, effects)
        fill(app, WARM + messages)
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

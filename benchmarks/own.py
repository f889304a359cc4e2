"""duly, through its public API: the same messages and handlers as the raw loops."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workload import (
    BATCH,
    BIG_BATCH,
    CHARGES,
    WARM,
    Order,
    Sample,
    Stopwatch,
    charge,
    check_charges,
    connect,
    ignore,
    in_batches,
    load,
    measured,
    orders,
)

import duly
from duly.guarantees import GuaranteeName
from duly.worker import Worker

CALLERS = 50
# Rarely, because each look takes the interpreter from the lane that is measured; the rows handle
# so many messages that one look more or less does not show.
POLL_S = 0.02
LONGEST_S = 200.0

# Kept, as the raw loops keep what they consumed; what deleting costs has a row of its own.
KEPT_S = 86_400.0
LEAST = duly.Topic("orders", Order, guarantee="at-least-once", retention_s=KEPT_S)
EXACTLY = duly.Topic("checkout", Order, guarantee="exactly-once", retention_s=KEPT_S)
DELETED = duly.Topic("orders", Order, guarantee="at-least-once")


@contextmanager
def app_in(directory: Path, store: str | None = None) -> Iterator[duly.App]:
    """An app on a file of this directory; ``store``: another file for the effects."""
    effects = None if store is None else f"sqlite:///{directory / store}"
    app = duly.App("shop", broker=f"sqlite:///{directory / 'duly.db'}", store=effects)
    try:
        yield app
    finally:
        app.close()


# --- publishing -----------------------------------------------------------------------------------


def publish(directory: Path, messages: int, topic: duly.Topic[Order] = LEAST) -> Sample:
    """``publish_many`` in batches."""
    with app_in(directory) as app:
        warm, rest = orders(WARM), orders(messages, WARM)
        for batch in in_batches(warm, BATCH):
            app.publish_many(topic, batch)
        with measured(messages) as sample:
            for batch in in_batches(rest, BATCH):
                app.publish_many(topic, batch)
        return sample


def publish_singly(directory: Path, messages: int, topic: duly.Topic[Order] = LEAST) -> Sample:
    """One caller, a message a call, each durable on return."""
    with app_in(directory) as app:
        for order in orders(100):
            app.publish(topic, order)
        rest = orders(messages, WARM)
        with measured(messages) as sample:
            for order in rest:
                app.publish(topic, order)
        return sample


def publish_from_threads(directory: Path, messages: int) -> Sample:
    """50 threads, a message a call."""
    with app_in(directory) as app:
        ready = threading.Barrier(CALLERS + 1)

        def call(mine: Sequence[Order]) -> None:
            app.publish(LEAST, mine[0])
            ready.wait()
            for order in mine[1:]:
                app.publish(LEAST, order)

        each = messages // CALLERS
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


def publish_from_tasks(directory: Path, messages: int) -> Sample:
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

    with app_in(directory) as app:
        return asyncio.run(everybody(app))


# --- consuming ------------------------------------------------------------------------------------


def fill(app: duly.App, topic: duly.Topic[Order], messages: int) -> None:
    for first in range(0, messages, BIG_BATCH):
        app.publish_many(topic, orders(min(BIG_BATCH, messages - first), first))


def work(app: duly.App, name: str, messages: int, warm: int) -> Sample:
    """Let a worker handle everything; timed from the first poll after the warm-up."""
    watch = Stopwatch(messages)
    worker = Worker(app)
    give_up = time.monotonic() + LONGEST_S

    def handled() -> int:
        if time.monotonic() > give_up:
            raise TimeoutError(f"only {worker.counts()[name].handled} messages were handled")
        worker.wait(POLL_S)
        return worker.counts()[name].handled

    with worker:
        while (before := handled()) < warm:
            pass
        watch.start()
        while handled() < warm + messages:
            pass
        watch.stop()
    watch.sample.messages = warm + messages - before
    return watch.sample


def consume_empty(
    directory: Path,
    messages: int,
    guarantee: GuaranteeName,
    topic: duly.Topic[Order] = LEAST,
) -> Sample:
    """The empty handler under each guarantee."""
    with app_in(directory) as app:
        match guarantee:
            case "at-most-once":
                app.consumer(topic, name="empty", guarantee="at-most-once", batch=BATCH)(ignore)
            case "at-least-once":
                app.consumer(topic, name="empty", guarantee="at-least-once", batch=BATCH)(ignore)
            case "exactly-once":
                app.consumer(topic, name="empty", guarantee="exactly-once", batch=BATCH)(nothing)
        fill(app, topic, WARM + messages)
        return work(app, "empty", messages, WARM)


def nothing(order: Order, tx: duly.Transaction[sqlite3.Connection]) -> None:
    """The empty handler, in a transaction."""


def consume_and_charge(
    directory: Path, messages: int, batch: int = BATCH, store: str | None = None
) -> Sample:
    """Exactly-once, one inserted row a message; ``store``: by inbox, in another file."""
    effects = directory / (store or "duly.db")
    warm = batch * max(1, WARM // batch) if batch > 1 else 100
    with app_in(directory, store) as app:
        app.consumer(EXACTLY, name="billing", guarantee="exactly-once", batch=batch)(charge)
        fill(app, EXACTLY, warm + messages)
        create_charges(effects)
        sample = work(app, "billing", messages, warm)
    check_charges(effects, warm + messages)
    return sample


def create_charges(path: Path) -> None:
    connection = connect(path)
    connection.execute(CHARGES)
    connection.close()


class Effects:
    """The handler's own database work: commits once a batch, as an exactly-once lane does."""

    def __init__(self, path: Path, batch: int) -> None:
        self.connection = connect(path)
        self._batch = batch
        self._count = 0

    def handle(self, order: Order) -> None:
        if self._count % self._batch == 0:
            self.connection.execute("begin immediate")
        charge(order, self)
        self._count += 1
        if self._count % self._batch == 0:
            self.connection.execute("commit")


def consume_at_least_once(directory: Path, messages: int, batch: int = BATCH) -> Sample:
    """The same row a message, committed once a batch; settled in a second durable commit."""
    path = directory / "duly.db"
    warm = batch * max(1, WARM // batch) if batch > 1 else 100
    with app_in(directory) as app:
        fill(app, LEAST, warm + messages)
        create_charges(path)
        effects = Effects(path, batch)

        @app.consumer(LEAST, name="billing", guarantee="at-least-once", batch=batch)
        def handle(order: Order) -> None:
            effects.handle(order)

        sample = work(app, "billing", messages, warm)
        effects.connection.close()
    check_charges(path, warm + messages)
    return sample


def consume_and_load(directory: Path, messages: int, batch: int = BATCH) -> Sample:
    """A batch handler that inserts with ``executemany``."""
    warm = batch * max(1, WARM // batch)
    with app_in(directory) as app:
        app.batch_consumer(EXACTLY, name="warehouse", guarantee="exactly-once", batch=batch)(load)
        fill(app, EXACTLY, warm + messages)
        create_charges(directory / "duly.db")
        sample = work(app, "warehouse", messages, warm)
    check_charges(directory / "duly.db", warm + messages)
    return sample

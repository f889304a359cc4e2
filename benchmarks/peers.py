"""Huey and persist-queue at their best settings, on the same disk, as durable as duly is here.

Both run SQLite in WAL mode with ``synchronous=FULL`` (the driver's default, which they keep).
Neither publishes or claims more than one message a commit, except persist-queue's
``task_done``, which deletes all that was taken in one commit.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from workload import (
    BATCH,
    CHARGES,
    Order,
    Sample,
    Stopwatch,
    charge,
    check_charges,
    connect,
    ignore,
    measured,
    orders,
)

WARM = 200  # a commit or two a message: fewer are enough
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode


class Plain:
    """Bodies as they are: the same bytes and the same codec as everywhere else."""

    def serialize(self, data: Any) -> bytes:
        return encode(data)

    def deserialize(self, data: bytes) -> Any:
        return msgspec.json.decode(data)

    def dumps(self, value: bytes) -> bytes:
        return value

    def loads(self, value: bytes) -> bytes:
        return value


# --- Huey -----------------------------------------------------------------------------------------


def huey_at(directory: Path) -> Any:
    """No results stored (one commit less), fsync on, 32 MB of cache; tasks as Huey pickles them."""
    from huey import SqliteHuey

    logging.getLogger("huey").setLevel(logging.ERROR)
    return SqliteHuey(
        filename=str(directory / "huey.db"), results=False, fsync=True, cache_mb=32, timeout=30
    )


def nothing(_body: bytes) -> None:
    """A task that is never run."""


def huey_publish(directory: Path, messages: int) -> Sample:
    huey = huey_at(directory)
    task = huey.task()(nothing)
    bodies = [encode(order) for order in orders(WARM + messages)]
    for body in bodies[:WARM]:
        task(body)
    with measured(messages) as sample:
        for order in orders(messages, WARM):
            task(encode(order))
    return sample


def huey_consume(directory: Path, messages: int, handle: Callable[[Order], None]) -> Sample:
    """Its own consumer, one worker thread: more only wait for the same lock."""
    huey = huey_at(directory)
    watch = Stopwatch(messages)
    done = threading.Event()
    seen = 0

    def run(body: bytes) -> None:
        nonlocal seen
        handle(decode(body))
        seen += 1
        if seen == WARM:
            watch.start()
        elif seen == WARM + messages:
            watch.stop()
            done.set()

    task = huey.task()(run)
    fill(directory / "huey.db", huey, task, [encode(order) for order in orders(WARM + messages)])
    consumer = huey.create_consumer(
        workers=1, periodic=False, initial_delay=0.001, backoff=1.0, check_worker_health=False
    )
    consumer.start()
    if not done.wait(120):
        raise TimeoutError("Huey did not finish")
    consumer.stop(graceful=True)
    return watch.sample


def fill(path: Path, huey: Any, task: Any, bodies: list[bytes]) -> None:
    """Enqueue without an fsync a message; not part of what is measured."""
    rows = [(huey.name, huey.serialize_task(task.s(body))) for body in bodies]
    with sqlite3.connect(path) as connection:
        connection.executemany("insert into task (queue, data, priority) values (?, ?, 0)", rows)
    connection.close()


def huey_charge(directory: Path, messages: int) -> Sample:
    """One row a message: its own commit, beside the one that took the task."""
    own = connect(directory / "effects.db")
    own.execute(CHARGES)
    tx = _Own(own)
    sample = huey_consume(directory, messages, lambda order: charge(order, tx))
    check_charges(directory / "effects.db", WARM + messages)
    return sample


class _Own:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection


# --- persist-queue --------------------------------------------------------------------------------


def persist_queue_publish(directory: Path, messages: int) -> Sample:
    from persistqueue import FIFOSQLiteQueue

    queue = FIFOSQLiteQueue(str(directory), serializer=Plain(), multithreading=True)
    for order in orders(WARM):
        queue.put(encode(order))
    with measured(messages) as sample:
        for order in orders(messages, WARM):
            queue.put(encode(order))
    return sample


def persist_queue_consume(
    directory: Path, messages: int, handle: Callable[[Order], None] = ignore
) -> Sample:
    """``auto_commit=False``: 500 are taken and handled, then ``task_done`` deletes them at once."""
    from persistqueue import FIFOSQLiteQueue

    make = FIFOSQLiteQueue(str(directory), serializer=Plain(), multithreading=True)
    persist_fill(directory, make._table_name, "data, timestamp", BATCH + messages)
    queue = FIFOSQLiteQueue(
        str(directory), serializer=Plain(), multithreading=True, auto_commit=False
    )
    watch = Stopwatch(messages)
    for n in range(0, BATCH + messages, BATCH):
        if n == BATCH:
            watch.start()
        for _ in range(BATCH):
            handle(decode(queue.get(block=False)))
        queue.task_done()
    watch.stop()
    return watch.sample


def persist_queue_charge(directory: Path, messages: int) -> Sample:
    """One row a message in a commit a batch, then ``task_done``: at-least-once."""
    own = connect(directory / "effects.db")
    own.execute(CHARGES)
    tx = _Own(own)
    count = 0

    def handle(order: Order) -> None:
        nonlocal count
        if count % BATCH == 0:
            own.execute("begin immediate")
        charge(order, tx)
        count += 1
        if count % BATCH == 0:
            own.execute("commit")

    sample = persist_queue_consume(directory, messages, handle)
    check_charges(directory / "effects.db", BATCH + messages)
    return sample


def persist_ack_consume(directory: Path, messages: int) -> Sample:
    """The queue with acknowledgements: one commit to take, one to acknowledge."""
    from persistqueue import SQLiteAckQueue

    make = SQLiteAckQueue(str(directory), serializer=Plain(), multithreading=True)
    persist_fill(directory, make._table_name, "data, timestamp, status", WARM + messages)
    queue = SQLiteAckQueue(str(directory), serializer=Plain(), multithreading=True)
    watch = Stopwatch(messages)
    for n in range(WARM + messages):
        if n == WARM:
            watch.start()
        taken = queue.get(block=False, raw=True)
        ignore(decode(taken["data"]))
        queue.ack(id=taken["pqid"])
    watch.stop()
    return watch.sample


def persist_fill(directory: Path, table: str, columns: str, messages: int) -> None:
    now = time.time()
    rest = (now, 0)[: columns.count(",")]
    rows = [(encode(order), *rest) for order in orders(messages)]
    marks = ", ".join("?" * (columns.count(",") + 1))
    with sqlite3.connect(directory / "data.db") as connection:
        connection.executemany(f"insert into {table} ({columns}) values ({marks})", rows)
    connection.close()
